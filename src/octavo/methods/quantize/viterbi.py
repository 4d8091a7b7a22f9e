"""The best path through the trellis of :mod:`octavo.forms.trellis` (Viterbi, 1967).

numba compiles it if installed (the extra ``numba``). Otherwise NumPy finds the same path step by step, tens of times
slower.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from octavo.forms.trellis import LANES
from octavo.methods.quantize import viterbi_loops
from octavo.methods.quantize.trellis_machine import BEFORE, LARGEST, REMAINDER, STATES

_FAR = np.float32(1e30)


def best_path(targets: np.ndarray, classes: np.ndarray, penalties: np.ndarray, state: np.ndarray) -> np.ndarray:
    """Decodable levels that minimize ``sum (target - level)^2 + penalty``.

    Parameters
    ----------
    targets
        (steps * LANES,) float32, in units of the distance of two levels. Element i belongs to lane ``i % LANES``.
    classes
        Row of ``penalties`` for each target, int32 of the same shape.
    penalties
        (2, classes, codes) float32: the cost of each code of both quantizers, with zero in the middle; codes further
        out cost as much as the outermost.
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
    """The NumPy version, with one call for all states and lanes of a step."""
    half, lanes = penalties.shape[2] // 2, np.arange(LANES)
    # Each remainder has one of every four adjacent levels.
    levels = first + ((np.arange(4, dtype=np.int32)[:, None] - first) & 3)
    errors = targets - levels.astype(np.float32)
    codes = np.clip(levels >> 1, -half, half - 1) + half
    costs = errors * errors + penalties[np.arange(4)[:, None] & 1, classes, codes]
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


def sweep() -> Callable[..., None] | None:
    """``sweep`` of :mod:`octavo.methods.quantize.viterbi_loops`, compiled; None without numba."""
    return viterbi_loops.compiled_sweep()


def _search() -> Callable[..., np.ndarray]:
    """The fastest available version."""
    return viterbi_loops.compiled_search() or _plain
