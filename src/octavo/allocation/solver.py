"""Choosing a point for every site, with one Lagrange multiplier over all sites and families."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from octavo.allocation.budget import Budget
from octavo.allocation.interpolation import densified, family
from octavo.allocation.knapsack import knapsack
from octavo.allocation.plans import MIXED, Plan
from octavo.allocation.profiles import Curve, Point, Profile, alike
from octavo.errors import BudgetError
from octavo.methods import Setting, get_method
from octavo.methods.selecting import dense_names


def solve(costs: np.ndarray, losses: np.ndarray, room: int) -> np.ndarray:
    """Index of the chosen point of every site: least loss at a total cost of at most ``room``.

    For a given multiplier every site takes its least ``loss + multiplier * cost``, a point of its lower hull; the
    multiplier is found by bisection. The remaining budget goes, step by step, to the site that gains most per unit,
    with points off the hull.

    Parameters
    ----------
    costs, losses
        (sites, points): integers (bytes or another resource) and floats. Missing points of a site have a cost beyond
        all others and an infinite loss.
    """
    rows = np.arange(len(costs))
    low, high = -80.0, 40.0
    chosen = costs.argmin(1)
    for _ in range(80):
        middle = (low + high) / 2
        trial = (losses + np.exp(middle) * costs).argmin(1)
        if costs[rows, trial].sum() <= room:
            chosen, high = trial, middle
        else:
            low = middle
    return filled(costs, losses, chosen, room)


def filled(costs: np.ndarray, losses: np.ndarray, chosen: np.ndarray, room: int) -> np.ndarray:
    """A choice improved by giving the remaining budget, step by step, to the site that gains most per unit."""
    rows, chosen = np.arange(len(costs)), chosen.copy()
    size, loss = costs[rows, chosen], losses[rows, chosen]
    for row, column in improvements(costs, losses, size, loss, room - int(size.sum()), only_larger=True):
        chosen[row] = column
    return chosen


def improvements(
    costs: np.ndarray, losses: np.ndarray, size: np.ndarray, loss: np.ndarray, left: int, *, only_larger: bool = False
) -> Iterator[tuple[int, int]]:
    """The next site and point that gain most per unit and fit into what is ``left``, one after another.

    Parameters
    ----------
    costs, losses
        (sites, points), as for :func:`solve`.
    size, loss
        (sites,): cost and loss of what is chosen so far.
    only_larger
        Whether a point must cost more than the one chosen. Otherwise those that cost less come first.
    """
    size, loss = size.copy(), loss.copy()
    while costs.size:
        more = costs - size[:, None]
        with np.errstate(invalid="ignore"):  # a point that is missing is infinitely bad, and so may one chosen be
            gain = loss[:, None] - losses
        usable = (more <= left) & (gain > 0) & ((more > 0) | (not only_larger))
        worth = np.where(usable, gain / np.maximum(more, 1), 0.0)
        row, column = divmod(int(worth.argmax()), worth.shape[1])
        if worth[row, column] <= 0:
            return
        yield row, column
        left -= int(more[row, column])
        size[row], loss[row] = costs[row, column], losses[row, column]


class PointTable:
    """All points of all sites as arrays, so that solving for one multiplier takes microseconds."""

    def __init__(self, profile: Profile, methods: Iterable[str] | None = None, *, interpolate: bool = True) -> None:
        allowed, dense = None if methods is None else set(methods), dense_names()
        self.profile, self.rows = profile, profile.joint()
        #: For each row the choices: one point of every curve in it.
        self.points: list[list[tuple[Point, ...]]] = []
        for curves in self.rows:
            found = []
            for curve in curves:
                every = densified(curve) if interpolate else curve.points
                points = [p for p in every if allowed is None or p.method in allowed]
                found.append(points or [p for p in curve.points if p.method in dense] or list(curve.points))
            self.points.append(alike(found) or alike([curve.points for curve in curves]))
        width = max(map(len, self.points), default=0)
        self.bytes = np.full((len(self.points), width), 2**62, dtype=np.int64)
        self.loss = np.full((len(self.points), width), np.inf)
        for row, (curves, choices) in enumerate(zip(self.rows, self.points, strict=True)):
            self.bytes[row, : len(choices)], self.loss[row, : len(choices)] = totals(profile, curves, choices)

    def solve(self, room: int, *, thorough: bool = True) -> np.ndarray:
        """Index of the chosen point of every site, at most ``room`` bytes in total; by a multiplier, or better."""
        chosen = solve(self.bytes, self.loss, room)
        if not thorough or self._elastic:
            return chosen
        # Without a continuous setting nothing fills the gap that a multiplier leaves.
        other = filled(self.bytes, self.loss, knapsack(self.bytes, self.loss, room), room)
        return min(chosen, other, key=self.total)

    @cached_property
    def _elastic(self) -> bool:
        """Whether any method has a continuous setting."""
        names = {point.method for row in self.points for points in row for point in points}
        return any(get_method(name).elastic for name in names)

    def total(self, chosen: np.ndarray) -> float:
        """Expected loss of a choice."""
        return float(self.loss[np.arange(len(chosen)), chosen].sum())

    def plan(self, budget: Budget, room: int, label: str = MIXED, *, thorough: bool = True) -> Plan:
        """The best plan within ``room`` bytes for all sites."""
        chosen = self.solve(room, thorough=thorough)
        points = {
            curve.site: point
            for row, curves in enumerate(self.rows)
            for curve, point in zip(curves, self.points[row][chosen[row]], strict=True)
        }
        return Plan(budget, points, self.total(chosen), self.profile.fixed_bytes, label)

    def allocate(self, budget: Budget, *, margin: float = 0.0, thorough: bool = True) -> Plan:
        """The plan of least expected loss within the budget; parameters and errors are those of :func:`allocate`."""
        smallest = int(self.bytes.min(1).sum()) + self.profile.fixed_bytes
        if smallest > budget.bytes:
            raise unreachable(budget, self.profile.original_bytes, smallest)
        room = max(int(budget.bytes * (1 - margin)), smallest) - self.profile.fixed_bytes
        return self.plan(budget, room, thorough=thorough)


def totals(
    profile: Profile, curves: Sequence[Curve], choices: Sequence[tuple[Point, ...]]
) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and expected loss of every choice, each of which is one point of every curve."""
    size, loss = np.zeros(len(choices), np.int64), np.zeros(len(choices))
    for place, curve in enumerate(curves):
        points = [choice[place] for choice in choices]
        size += np.array([point.bytes for point in points], np.int64)
        loss += profile.corrected_all(curve, [point.loss for point in points])
    return size, loss


def allocate(
    profile: Profile,
    budget: Budget,
    *,
    margin: float = 0.0,
    methods: Iterable[str] | None = None,
    interpolate: bool = True,
    thorough: bool = True,
) -> Plan:
    """The plan of least expected loss within the budget.

    Parameters
    ----------
    margin
        Share of the budget left free, since the bytes of interpolated points are slightly off.
    methods
        Names of the methods to use; all by default.
    interpolate
        Whether settings between the measured ones may be chosen.
    thorough
        Whether to try more than a multiplier if settings are few.

    Raises
    ------
    BudgetError
        If even the smallest points do not fit.
    """
    choices = PointTable(profile, methods, interpolate=interpolate)
    return choices.allocate(budget, margin=margin, thorough=thorough)


def unreachable(budget: Budget, original_bytes: int, smallest: int, *, roughly: bool = False) -> BudgetError:
    """The error that names the largest reachable ratio; ``roughly``, one that is surely reachable."""
    limit = int(original_bytes / smallest * 100) / 100
    if roughly:
        return BudgetError(
            f"{budget.asked}: this source needs about {smallest} {budget.unit} or somewhat less, the budget is "
            f"{budget.bytes}; ask for a ratio of at most {limit:g}, or try a little more",
            limit,
        )
    return BudgetError(
        f"{budget.asked}: this source needs at least {smallest} {budget.unit}, the budget is {budget.bytes}; "
        f"ask for a ratio of at most {limit:g}",
        limit,
    )


def uniform(profile: Profile, budget: Budget) -> list[Plan]:
    """The best uniform plan of every method within the budget, best expected loss first.

    Sites where the method does not apply or was screened out are kept in 16 bits, or as finely as the allowed methods
    permit.
    """
    plans = []
    names = sorted({point.method for curve in profile.curves for point in curve.points})
    for name in names:
        candidates = _elastic(profile, budget, name) if _one_knob(profile, name) else _settings(profile, name)
        # If 16 bits are smaller at every site, the method is not used at all.
        candidates = [plan for plan in candidates if any(point.method == name for point in plan.values())]
        fitting = [plan for plan in candidates if _total(profile, plan) <= budget.bytes]
        if fitting:
            best = min(fitting, key=lambda points: _loss(profile, points))
            example = next(p for p in best.values() if p.method == name)
            label = labelled(name, example.setting)
            plans.append(Plan(budget, best, _loss(profile, best), profile.fixed_bytes, label))
    return sorted(plans, key=lambda plan: plan.expected)


def labelled(method: str, setting: Setting) -> str:
    """The label of a plan that uses one setting everywhere."""
    return f"{method} " + " ".join(f"{key}={value}" for key, value in setting.items())


def _settings(profile: Profile, name: str) -> list[dict[str, Point]]:
    seen: dict[str, dict[str, Any]] = {}
    dense = dense_names()
    for curve in profile.curves:
        seen.update({repr(p.setting): p.setting for p in curve.points if p.method == name})
    own = {curve.site: [p for p in curve.points if p.method == name] for curve in profile.curves}
    kept = {curve.site: [p for p in curve.points if p.method in dense] for curve in profile.curves}
    others = {
        curve.site: min(kept[curve.site], key=lambda p: p.bytes, default=None)
        or min(curve.points, key=lambda p: (math.isnan(p.loss), p.loss))
        for curve in profile.curves
    }
    plans = []
    for setting in seen.values():
        points = {}
        for site, point in others.items():
            found = next((p for p in own[site] if p.setting == setting), point)
            # A kernel pads a matrix of few rows until 16 bits are smaller.
            smaller = (p for p in kept[site] if p.bytes < found.bytes and p.loss <= found.loss)
            points[site] = min(smaller, key=lambda p: p.loss, default=found)
        plans.append(points)
    return plans


def _one_knob(profile: Profile, name: str) -> bool:
    """Whether a method has points at every site, and one continuous knob is its only setting."""
    knob = get_method(name).elastic
    found = [[point.setting for point in curve.points if point.method == name] for curve in profile.curves]
    return knob is not None and all(found) and all(set(setting) == {knob} for settings in found for setting in settings)


def _elastic(profile: Profile, budget: Budget, name: str) -> list[dict[str, Point]]:
    """The finest step that fits, the same for all sites; it is in units of loss, so it means the same everywhere."""
    families = {curve.site: family(curve, name) for curve in profile.curves}
    low, high = -60.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        fits = profile.fixed_bytes + sum(found.bytes_at(middle) for found in families.values()) <= budget.bytes
        low, high = (low, middle) if fits else (middle, high)
    return [{site: found.at(high) for site, found in families.items()}]


def _total(profile: Profile, points: Mapping[str, Point]) -> int:
    return profile.fixed_bytes + sum(point.bytes for point in points.values())


def _loss(profile: Profile, points: Mapping[str, Point]) -> float:
    return sum(profile.corrected(curve, points[curve.site].loss) for curve in profile.curves)
