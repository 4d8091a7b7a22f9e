"""Where settings are few: the choice of least loss in a given room, by dynamic programming over that room.

A multiplier (:func:`octavo.allocation.solver.solve`) finds only points on lower hulls. With hundreds of settings a site
that misses little; with a handful it leaves room in which one large site lowered by a step would let many small ones
rise.
"""

from __future__ import annotations

import numpy as np

#: Sites times steps of room that are looked at, and steps alone. Beyond that steps are larger and costs rounded up.
_CELLS, _STEPS = 1 << 24, 1 << 20


def knapsack(costs: np.ndarray, losses: np.ndarray, room: int) -> np.ndarray:
    """Index of the chosen point of every site, of least loss at a cost of at most ``room`` in sum.

    The answer is exact where the costs have a common divisor that is not too small, as those of kernels do. Otherwise
    costs are rounded up a little.

    Parameters
    ----------
    costs, losses
        (sites, points): integers and floats; where a site has fewer points, a cost beyond all and an infinite loss.
    """
    chosen = costs.argmin(1)
    left = room - int(costs.min(1).sum())
    if left < 0 or not len(costs):
        return chosen
    extra = costs - costs.min(1)[:, None]
    points = [_worthwhile(row, loss, left) for row, loss in zip(extra, losses, strict=True)]
    left = min(left, sum(int(extra[row, columns[-1]]) for row, columns in enumerate(points)))
    unit = int(np.gcd.reduce(np.concatenate([extra[row, columns] for row, columns in enumerate(points)])))
    unit = max(unit, -(-left * len(costs) // _CELLS), -(-left // _STEPS), 1)
    steps = -(-extra // unit)
    best = np.zeros(left // unit + 1)
    taken = np.empty((len(costs), len(best)), np.min_scalar_type(costs.shape[1]))
    for row, columns in enumerate(points):
        least, pick = np.full(len(best), np.inf), taken[row]
        for column in columns:
            step = int(steps[row, column])
            if step < len(best):
                trial = best[: len(best) - step] + losses[row, column]
                better = trial < least[step:]
                least[step:][better] = trial[better]
                pick[step:][better] = column
        best = least
    place = len(best) - 1
    for row in range(len(costs) - 1, -1, -1):
        chosen[row] = taken[row, place]
        place -= int(steps[row, chosen[row]])
    return chosen


def _worthwhile(extra: np.ndarray, losses: np.ndarray, left: int) -> list[int]:
    """Points that fit and that no smaller one equals or beats, smallest first."""
    columns: list[int] = []
    for column in np.lexsort((losses, extra)):
        if extra[column] <= left and (not columns or losses[column] < losses[columns[-1]]):
            columns.append(int(column))
    return columns
