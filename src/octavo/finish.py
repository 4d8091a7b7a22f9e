"""Encoding a plan so that its artifact uses the budget exactly, and the plans that it must beat."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from octavo.allocate import Plan, allocate, uniform, unreachable
from octavo.artifact import Contents, Packed
from octavo.budget import Budget
from octavo.calibrate import Calibration
from octavo.errors import BudgetError, OctavoError, RequestError
from octavo.job import Job
from octavo.methods import get_method
from octavo.narrowing import Narrowing
from octavo.profile import Point, Profile, slope
from octavo.raw import Lazily
from octavo.workspace import Workspace

#: Interpolated points miss their bytes by a little: plans aim this share below the budget and are finished exactly.
MARGIN = 0.004
_ROUNDS = 8
_RETREATS = 3
#: Share of its bytes that a site may gain or lose to close a small gap.
_SHARE = 0.04


@dataclass
class Built:
    """A plan that was encoded: its exact contents and what it lost on held-back data.

    Of a rival that nothing can be measured of, ``packed`` and ``contents`` are empty, and the figures are the plan's.
    """

    plan: Plan
    packed: dict[str, Packed]
    contents: Contents
    bytes: int
    quality: float
    p95: float | None = None

    @property
    def counted(self) -> int:
        """What the budget counts: artifact bytes, or those in memory if it was made for memory."""
        return self.bytes if self.contents.resident is None else self.contents.resident


def finish(
    job: Job,
    profile: Profile,
    calibration: Calibration,
    room: Workspace,
    plan: Plan,
    asked: Budget,
    *,
    exact: bool = True,
) -> Built:
    """Encode a plan and, if ``exact``, move continuous settings until the artifact uses the budget.

    Raises
    ------
    RequestError
        If a plan that must not be moved exceeds the budget.
    """
    points, packed, contents = _encoded(job, profile, calibration, room, plan, asked if exact else None)
    total = contents.counted
    aim = asked.bytes
    for _ in range(_RETREATS if exact else 0):
        if total <= asked.bytes:
            break
        # Continuous settings could not be moved close enough: points of known bytes never exceed the budget, and those
        # that were measured on a sample do so by little, which the next attempt leaves free.
        known = allocate(profile, replace(asked, bytes=aim), margin=2 * MARGIN, interpolate=False)
        points, packed, contents = _encoded(job, profile, calibration, room, known, None)
        total = contents.counted
        aim -= max(total - asked.bytes, 0)
    if total > asked.bytes and exact:
        raise unreachable(asked, profile.original_bytes, total)
    if total > asked.bytes:
        raise RequestError(
            f"the plan takes {total} bytes, its budget is {asked.bytes}; choose coarser settings for some sites"
        )
    expected = sum(profile.corrected(curve, points[curve.site].loss) for curve in profile.curves)
    fixed = total - sum(item.counted(job.target) for item in packed.values())
    done = Plan(plan.budget, points, expected, fixed, plan.label, plan.notes)
    size = total if job.target == "disk" else contents.bytes
    if not job.measurable:
        return Built(done, packed, contents, size, expected)
    stored = {name: kept.given for name, kept in contents.kept.items()}
    losses = job.measure(Lazily({**job.weights(packed).made, **stored})).numpy()
    return Built(done, packed, contents, size, float(losses.mean()), float(np.quantile(losses, 0.95)))


def _encoded(
    job: Job, profile: Profile, calibration: Calibration, room: Workspace, plan: Plan, asked: Budget | None
) -> tuple[dict[str, Point], dict[str, Packed], Contents]:
    """Encode a plan; with a budget, move its continuous settings until the bytes fit, if they can be made to."""
    points, packed = dict(plan.points), dict[str, Packed]()
    moved = points
    signs: set[bool] = set()
    for attempt in range(_ROUNDS):
        for done, (name, found) in enumerate(job.encode_all(moved, calibration, room)):
            points[name], packed[name] = replace(moved[name], bytes=found.counted(job.target), estimated=False), found
            job.progress("encode", done + 1, len(moved))
        contents = job.contents(packed, _kept(job, profile, points))
        if asked is None or attempt == _ROUNDS - 1 or _fits(contents.counted, asked):
            break
        free = {name: point for name, point in points.items() if name not in job.pinned}
        missing = int(asked.bytes * (1 - MARGIN / 2)) - contents.counted
        signs.add(missing > 0)
        moved = _move(profile, free, missing, alone=len(signs) > 1)
        if not moved:
            break
    return points, packed, contents


def _kept(job: Job, profile: Profile, points: Mapping[str, Point]) -> Narrowing:
    # Where no site loses anything, what is no site shall lose nothing either.
    lossless = not job.pinned and all(point.loss == 0 for point in points.values())
    return Narrowing.EXACT if lossless else Narrowing(profile.options["kept"])


def _fits(total: int, asked: Budget) -> bool:
    return asked.bytes * (1 - 2.5 * MARGIN) <= total <= asked.bytes


def _move(profile: Profile, points: Mapping[str, Point], missing: int, *, alone: bool) -> dict[str, Point]:
    """New points of continuous settings that change the bytes by about ``missing``.

    A small gap is closed at the largest such sites alone, as few as close it with a small share of their bytes, so that
    little has to be encoded again; a large one by moving all of them together, which keeps them at one slope. Once that
    has overshot (a coder's sizes have jumps) only the largest is moved, so that sites may end on different sides of a
    jump.
    """
    elastic = {name: point for name, point in points.items() if get_method(point.method).elastic}
    if not elastic:
        return {}
    largest = sorted(elastic, key=lambda name: -elastic[name].bytes)
    within = np.cumsum([_SHARE * elastic[name].bytes for name in largest])
    few = 1 if alone else 1 + int(np.searchsorted(within, abs(missing)))
    moving = {name: elastic[name] for name in largest[:few]}
    curves = {curve.site: curve for curve in profile.curves}
    octaves = missing / sum(slope(curves[name], point) for name, point in moving.items())
    octaves = float(np.clip(octaves, -2, 2))
    moved = {}
    for name, point in moving.items():
        method = get_method(point.method)
        setting = method.at(point.setting, method.octaves(point.setting) + octaves)
        if setting != point.setting:
            moved[name] = Point(point.method, setting, point.bytes, point.loss * 4**octaves, estimated=True)
    return moved


def contest(
    job: Job, profile: Profile, calibration: Calibration, room: Workspace, mixed: Plan, asked: Budget
) -> tuple[Built, Built | None]:
    """Build the mixed plan and what it must beat; returns the winner, and the best uniform plan if it is another.

    The rivals are the best uniform plan at the same bytes, and the best plan of a single family. Where plans can be
    measured all are built, and the best wins. Where they cannot, the best expected one is, and the figures of the
    others are expectations: encoding them would tell nothing more.
    """
    rivals = uniform(profile, Budget(int(asked.bytes * (1 - MARGIN)), asked.asked))[:1]
    rivals += single_families(profile, asked)[:1]
    plans = [mixed, *rivals] if job.measurable else sorted([mixed, *rivals], key=lambda plan: plan.expected)
    built = [finish(job, profile, calibration, room, plans[0], asked)]
    for plan in plans[1:]:
        if any(_same(plan, other.plan) for other in built):
            continue
        if not job.measurable:
            built.append(Built(plan, {}, Contents({}), plan.bytes, plan.expected))
            continue
        try:
            built.append(finish(job, profile, calibration, room, plan, asked))
        except OctavoError as error:
            job.notes.append(f"the {plan.label} plan could not be built for comparison: {error}")
    even = next((other for other in built if other.plan.label not in ("mixed", "one family")), None)
    return (min(built, key=lambda other: other.quality) if job.measurable else built[0]), even


def _same(one: Plan, other: Plan) -> bool:
    """Whether two plans differ by no more than the finishing of their continuous settings."""
    if {name: point.method for name, point in one.points.items()} != {n: p.method for n, p in other.points.items()}:
        return False
    return all(
        abs(math.log((point.bytes + 1) / (other.points[name].bytes + 1))) < MARGIN for name, point in one.points.items()
    )


def single_families(profile: Profile, asked: Budget) -> list[Plan]:
    """The best plan of every family on its own, best expected loss first. Dense storage belongs to every family."""
    used = {point.method for curve in profile.curves for point in curve.points}
    families: dict[str, list[str]] = {}
    for name in sorted(used - {"keep"}):
        families.setdefault(get_method(name).family, []).append(name)
    plans = []
    for family, names in families.items():
        try:
            plan = allocate(profile, asked, margin=MARGIN, methods=[*names, "keep"])
        except BudgetError:
            continue
        plan.label, plan.notes = "one family", [family]
        plans.append(plan)
    return sorted(plans, key=lambda plan: plan.expected)
