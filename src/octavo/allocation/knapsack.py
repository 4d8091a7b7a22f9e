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
    """Points that fit and have less loss than every smaller point, smallest first."""
    columns: list[int] = []
    for column in np.lexsort((losses, extra)):
        if extra[column] <= left and (not columns or losses[column] < losses[columns[-1]]):
            columns.append(int(column))
    return columns
