"""The best path through the trellis of :mod:`octavo.forms.trellis` (Viterbi, 1967).

It is compiled by numba where that is installed (the extra ``numba``). Without, NumPy takes the same path step by step,
tens of times slower.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from octavo.forms.trellis import LANES, PARITY_TAPS, QUANTIZER_TAPS
from octavo.methods.compiled import compiled

#: Targets beyond this are returned as they are: their levels would leave 32 bits.
LARGEST = 2**30
_FAR = np.float32(1e30)


def _machine() -> tuple[np.ndarray, np.ndarray]:
    """Return the two predecessors of every state, and the remainder modulo 4 of the levels that lead from each.

    A state holds what the past adds to the quantizer of now (its lowest bit) and of the steps to come. From a state of
    quantizer q, a code of parity p stands for a level of remainder ``2 p + q``. Both tables have shape (states, 2).
    """
    states = 1 << max(*QUANTIZER_TAPS, *PARITY_TAPS)
    quantizer_taps, parity_taps = (sum(1 << (tap - 1) for tap in taps) for taps in (QUANTIZER_TAPS, PARITY_TAPS))
    ways: list[list[tuple[int, int]]] = [[] for _ in range(states)]
    for state in range(states):
        for parity in (0, 1):
            quantizer = state & 1
            after = (state >> 1) ^ (quantizer * quantizer_taps) ^ (parity * parity_taps)
            ways[after].append((state, 2 * parity + quantizer))
    table = np.array(ways)
    return np.ascontiguousarray(table[:, :, 0]), np.ascontiguousarray(table[:, :, 1])


BEFORE, REMAINDER = _machine()
STATES = len(BEFORE)


def best_path(targets: np.ndarray, classes: np.ndarray, penalties: np.ndarray, state: np.ndarray) -> np.ndarray:
    """Levels of least ``sum (target - level)^2 + penalty`` that a decoder can follow.

    Parameters
    ----------
    targets
        (steps * LANES,) float32, in units of the distance of two levels. Element i belongs to lane ``i % LANES``.
    classes
        Row of ``penalties`` for each target, int32 of the same shape.
    penalties
        (classes, codes) float32: what each code costs, the one for zero in the middle; codes further out cost what the
        outermost cost.
    state
        (LANES,) int64: the state of each lane at the start. Overwritten with the states at the end.

    Returns
    -------
    numpy.ndarray
        float32, shaped like ``targets``. The code of a level is half of it, rounded down.
    """
    first = np.floor(np.clip(targets, -LARGEST, LARGEST)).astype(np.int32) - np.int32(1)
    levels = _search()(targets, first, classes, penalties, state)
    beyond = np.abs(targets) >= LARGEST
    return np.where(beyond, targets, levels) if beyond.any() else levels


def _plain(
    targets: np.ndarray, first: np.ndarray, classes: np.ndarray, penalties: np.ndarray, state: np.ndarray
) -> np.ndarray:
    """One NumPy call for all states and lanes of a step."""
    half, lanes = penalties.shape[1] // 2, np.arange(LANES)
    # Of every four neighbouring levels each remainder has one.
    levels = first + ((np.arange(4, dtype=np.int32)[:, None] - first) & 3)
    errors = targets - levels.astype(np.float32)
    costs = errors * errors + penalties[classes, np.clip(levels >> 1, -half, half - 1) + half]
    costs = costs.reshape(4, -1, LANES)
    sums = np.full((STATES, LANES), _FAR, np.float32)
    sums[state, lanes] = 0
    second = np.empty((costs.shape[1], STATES, LANES), bool)
    for step in range(costs.shape[1]):
        ways = sums[BEFORE] + costs[REMAINDER, step]
        second[step] = ways[:, 1] < ways[:, 0]
        sums = ways.min(1)
    now = sums.argmin(0)
    state[:] = now
    chosen = np.empty((costs.shape[1], LANES), np.int64)
    for step in range(costs.shape[1] - 1, -1, -1):
        way = second[step, now, lanes].astype(np.int64)
        chosen[step] = REMAINDER[now, way]
        now = BEFORE[now, way]
    return np.take_along_axis(levels, chosen.reshape(1, -1), 0)[0].astype(np.float32)


def _compiled(
    targets: np.ndarray, first: np.ndarray, classes: np.ndarray, penalties: np.ndarray, state: np.ndarray
) -> np.ndarray:
    """The same for numba, whose inner loops over lanes become vector instructions."""
    half, steps = np.int32(penalties.shape[1] // 2), len(targets) // LANES
    costs = np.empty((4, len(targets)), np.float32)
    for remainder in range(4):
        r = np.int32(remainder)
        for i in range(len(targets)):
            level = first[i] + ((r - first[i]) & np.int32(3))
            code = min(max(level >> np.int32(1), -half), half - np.int32(1)) + half
            error = targets[i] - np.float32(level)
            costs[remainder, i] = error * error + penalties[classes[i], code]
    sums = np.full((2, STATES, LANES), _FAR, np.float32)
    for lane in range(LANES):
        sums[0, state[lane], lane] = 0
    second = np.empty((steps, STATES, LANES), np.bool_)
    for step in range(steps):
        old, new, start = sums[step & 1], sums[1 - (step & 1)], step * LANES
        for s in range(STATES):
            a, b, at, bt = BEFORE[s, 0], BEFORE[s, 1], REMAINDER[s, 0], REMAINDER[s, 1]
            for lane in range(LANES):
                x = old[a, lane] + costs[at, start + lane]
                y = old[b, lane] + costs[bt, start + lane]
                new[s, lane] = min(x, y)
                second[step, s, lane] = y < x
    levels, last = np.empty(len(targets), np.float32), sums[steps & 1]
    for lane in range(LANES):
        s = 0
        for other in range(1, STATES):
            if last[other, lane] < last[s, lane]:
                s = other
        state[lane] = s
        for step in range(steps - 1, -1, -1):
            i, way = step * LANES + lane, np.int64(second[step, s, lane])
            levels[i] = first[i] + ((REMAINDER[s, way] - first[i]) & 3)
            s = BEFORE[s, way]
    return levels


def sweep() -> Callable[..., None] | None:
    """Compiled code for a block of columns that feed errors forward; None without numba.

    Its arguments are those of :func:`_sweep` but the first.
    """
    search, whole = compiled(_compiled), compiled(_sweep)
    return None if search is None or whole is None else partial(whole, search)


def _sweep(
    search: Callable[..., np.ndarray],
    targets: np.ndarray,
    feedback: np.ndarray,
    rounded: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    last: int,
    penalties: np.ndarray,
    states: np.ndarray,
) -> None:
    """Round a block of columns (:func:`octavo.methods.feedback.round_blocks`), for numba.

    A weight's class is the sum of its row's and its column's, (rows,) and (width,), cut at 0 and ``last``;
    ``penalties`` are those of :func:`best_path`, and ``states``, its states by column, (width, LANES).
    """
    width, height = targets.shape
    padded = (height + LANES - 1) // LANES * LANES
    column, first = np.zeros(padded, np.float32), np.zeros(padded, np.int32)
    classes = np.zeros(padded, np.int32)
    for j in range(width):
        for i in range(height):
            column[i] = targets[j, i]
        for k in range(j):
            share, errors = feedback[k, j], targets[k]
            for i in range(height):
                column[i] += share * errors[i]
        for i in range(height):
            first[i] = np.int32(math.floor(min(max(column[i], -LARGEST), LARGEST))) - np.int32(1)
            classes[i] = min(max(rows[i] + columns[j], 0), last)
        levels = search(column, first, classes, penalties, states[j])
        for i in range(height):
            value = column[i] if abs(column[i]) >= LARGEST else levels[i]
            rounded[j, i] = value
            targets[j, i] = column[i] - value


def _search() -> Callable[..., np.ndarray]:
    """The faster of the two that can be had."""
    return compiled(_compiled) or _plain
