"""The choice of least loss within a budget when settings are few, by dynamic programming over the budget.

A multiplier (:func:`octavo.allocation.solver.solve`) finds only points on lower hulls. With hundreds of settings per
site that loses little. With a handful, lowering one large site by a step may let many small sites rise.
"""

from __future__ import annotations

import numpy as np

#: Limits on sites times budget steps, and on budget steps. Beyond them, steps are larger and costs are rounded up.
_CELLS, _STEPS = 1 << 24, 1 << 20


def knapsack(costs: np.ndarray, losses: np.ndarray, room: int) -> np.ndarray:
    """Index of the chosen point of every site: least loss at a total cost of at most ``room``.

    The answer is exact if the costs have a common divisor that is large enough, as kernel sizes do. Otherwise costs are
    rounded up slightly.

    Parameters
    ----------
    costs, losses
        (sites, points): integers and floats. Missing points of a site have a cost beyond all others and an infinite
        loss.
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
    # Sites of small range first: what lies beyond the range of all sites so far needs no search.
    order = np.argsort([int(steps[row, columns[-1]]) for row, columns in enumerate(points)], kind="stable")
    whole = left // unit + 1
    best, trial, better = np.zeros(whole), np.empty(whole), np.empty(whole, bool)
    taken = np.zeros((len(costs), whole), np.min_scalar_type(costs.shape[1]))
    size = 1
    for row in order:
        known, size = size, min(whole, size + int(steps[row, points[row][-1]]))
        best[known:size] = best[known - 1]
        least, pick = np.full(size, np.inf), taken[row, :size]
        for column in points[row]:
            step = int(steps[row, column])
            if step < size:
                there = slice(0, size - step)
                np.add(best[there], losses[row, column], out=trial[there])
                np.less(trial[there], least[step:], out=better[there])
                np.copyto(least[step:], trial[there], where=better[there])
                np.copyto(pick[step:], column, where=better[there])
        taken[row, size:] = pick[-1]
        best[:size] = least
    place = whole - 1
    for row in order[::-1]:
        chosen[row] = taken[row, place]
        place -= int(steps[row, chosen[row]])
    return chosen


def _worthwhile(extra: np.ndarray, losses: np.ndarray, left: int) -> list[int]:
    """Points that fit and have less loss than every smaller point, smallest first."""
    columns: list[int] = []
    for column in np.lexsort((losses, extra)):
        if extra[column] <= left and (not columns or losses[column] < losses[columns[-1]]):
            columns.append(int(column))
    return columns
