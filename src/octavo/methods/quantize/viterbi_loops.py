"""The loops of :mod:`octavo.methods.quantize.viterbi` for numba, which takes a second to import: it waits for a call.

``sweep`` calls the compiled ``search`` as a global of its module. A compiled function passed as an argument has a new
type in every process, so numba would compile and cache its caller each time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from octavo.forms.trellis import LANES
from octavo.methods.quantize.trellis_machine import BEFORE, LARGEST, REMAINDER, STATES
from octavo.system.compiled import compiled

_FAR = np.float32(1e30)


def search(
    targets: np.ndarray, first: np.ndarray, classes: np.ndarray, penalties: np.ndarray, state: np.ndarray
) -> np.ndarray:
    """The search of :func:`octavo.methods.quantize.viterbi.best_path`; loops over lanes become vector instructions."""
    half, steps = np.int32(penalties.shape[2] // 2), len(targets) // LANES
    costs = np.empty((4, len(targets)), np.float32)
    for remainder in range(4):
        r, quantizer = np.int32(remainder), remainder & 1
        for i in range(len(targets)):
            level = first[i] + ((r - first[i]) & np.int32(3))
            code = min(max(level >> np.int32(1), -half), half - np.int32(1)) + half
            error = targets[i] - np.float32(level)
            costs[remainder, i] = error * error + penalties[quantizer, classes[i], code]
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


#: What ``sweep`` calls; :func:`compiled_sweep` sets it.
_search: Any = None


def compiled_search() -> Callable[..., Any] | None:
    """``search``, compiled; None without numba."""
    return compiled(search)


def compiled_sweep() -> Callable[..., Any] | None:
    """``sweep``, compiled; None without numba."""
    global _search
    _search = compiled(search)
    return compiled(sweep)


def sweep(
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

    A weight's class is the sum of its row's and its column's, (rows,) and (width,), clamped to 0 and ``last``;
    ``penalties`` are those of :func:`best_path`, and ``states`` its states by column, (width, LANES).
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
        levels = _search(column, first, classes, penalties, states[j])
        for i in range(height):
            value = column[i] if abs(column[i]) >= LARGEST else levels[i]
            rounded[j, i] = value
            targets[j, i] = column[i] - value
