"""What else a profile would have given: other sizes, uniform settings, and families that were tried in vain."""

from __future__ import annotations

import math
import statistics

from octavo.allocation.budget import Budget
from octavo.allocation.interpolation import densified
from octavo.allocation.solver import PointTable, uniform
from octavo.encoding.result import Result
from octavo.errors import BudgetError
from octavo.methods import get_method
from octavo.report.schema import (
    BestUniform,
    ChosenPoint,
    CurvePoint,
    Tradeoff,
    UniformPoint,
    UnusedFamily,
)


def unused(done: Result) -> dict[str, UnusedFamily]:
    """Families that were tried but chosen at no site, and the loss of their best settings at the same bytes."""
    chosen = done.built.plan.points
    won = {get_method(point.method).family for point in chosen.values()}
    tried: dict[str, dict[str, float]] = {}
    for curve in done.profile.curves:
        point = chosen[curve.site]
        least: dict[str, float] = {}
        for other in densified(curve):
            method = get_method(other.method)
            family = method.family
            # Keeping a weight unchanged is not a competing family.
            if family not in won and not method.dense:
                within = other.loss if other.bytes <= point.bytes else math.inf
                least[family] = min(least.get(family, math.inf), within)
        for family, loss in least.items():
            tried.setdefault(family, {})[curve.site] = loss
    found: dict[str, UnusedFamily] = {}
    for family, losses in sorted(tried.items()):
        smaller = {site: loss for site, loss in losses.items() if math.isfinite(loss)}
        times = {site: loss / chosen[site].loss for site, loss in smaller.items() if chosen[site].loss > 0}
        found[family] = UnusedFamily(
            sites=len(losses),
            larger=len(losses) - len(smaller),
            exact=len(smaller) - len(times),
            times=(min(times.values()), statistics.median(times.values())) if times else None,
            nearest=min(times, key=lambda site: times[site]) if times else None,
        )
    return found


def best_uniform(done: Result) -> BestUniform | None:
    """The best uniform plan, and the number of sites that use its setting."""
    rival = done.rival
    if rival is None:
        return None
    name = rival.plan.label.split()[0]
    own = [point.setting for point in rival.plan.points.values() if point.method == name]
    common = max(own, key=own.count)
    moving = get_method(name).elastic or ""
    same = [setting for setting in own if {**setting, moving: 0} == {**common, moving: 0}]
    in_memory = done.budget.target == "memory"
    return BestUniform(
        method=name,
        setting=common,
        sites=len(same),
        of=len(rival.plan.points),
        moved=any(setting != common for setting in same),
        # For a plan that was not built only the bytes that the budget counts are known.
        bytes=done.size(rival) if rival.packed or not in_memory else None,
        held=rival.counted if in_memory else None,
        quality=rival.quality,
    )


def tradeoff(done: Result, quality: float | None) -> Tradeoff:
    """Expected loss over ratios from the profile, and for uniform settings."""
    profile, rival = done.profile, done.rival
    points: list[CurvePoint] = []
    choices = PointTable(profile)
    # After a cut alone there is nothing to choose.
    for share in (0.5, 0.62, 0.78, 1.0, 1.25, 1.6, 2.0) if profile.curves else ():
        size = int(done.built.counted * share)
        try:
            plan = choices.allocate(Budget(size, ""))
        except BudgetError:
            continue
        if plan.bytes < 0.97 * size:
            continue  # beyond the profiled range the curve would only repeat its end
        expected = plan.expected + done.run.at_rest
        points.append(CurvePoint(profile.original_bytes / plan.bytes, plan.bytes, expected))
    rivals: list[UniformPoint] = []
    for plan in uniform(profile, done.budget):
        method, _, setting = plan.label.partition(" ")
        measured = rival.quality if rival is not None and rival.plan.label.startswith(f"{method} ") else None
        ratio = profile.original_bytes / plan.bytes
        rivals.append(UniformPoint(method, setting, ratio, plan.bytes, plan.expected + done.run.at_rest, measured))
    return Tradeoff(
        tuple(points),
        tuple(rivals),
        ChosenPoint(done.ratio, done.size(done.built), quality),
    )
