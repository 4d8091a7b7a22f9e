"""Encoding a plan so that its artifact uses the budget exactly, and the baselines that it must beat."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from octavo.allocation.budget import Budget
from octavo.allocation.counting import MARGIN
from octavo.allocation.encoded import as_weights, encode_all, seal
from octavo.allocation.interpolation import slope
from octavo.allocation.leftover import upgrades
from octavo.allocation.opened import Opened, Run
from octavo.allocation.plans import MIXED, ONE_FAMILY, Plan
from octavo.allocation.profiles import Point, Profile
from octavo.allocation.rivals import PlainRival, best_uniform
from octavo.allocation.solver import allocate, unreachable
from octavo.artifact import Contents, Packed
from octavo.errors import BudgetError, OctavoError, RequestError
from octavo.methods import Setting, get_method
from octavo.methods.selecting import dense_names
from octavo.sources.narrowing import Narrowing
from octavo.system.raw import Lazily

_ROUNDS = 8
_RETREATS = 3
#: Number of plans built and measured to spend the bytes that the best plan leaves.
_TRIES = 10
#: With preset ``fast`` a mixed plan is built only if the best uniform one is expected to lose more than so many times.
_CLOSE = 1.05
#: With preset ``fast`` the best uniform plan is built only if it is expected to lose at most so many times as much.
_HOPELESS = 2.0
#: Share of a site's bytes that may change to close a small gap.
_SHARE = 0.04
#: A site with more of the bytes than this share is left alone if others can close the gap.
_BULKY = 0.25


@dataclass
class Built:
    """An encoded plan: its exact contents and its loss on held-out data.

    Where nothing can be measured of a rival, ``packed`` and ``contents`` are empty, and the figures are the plan's.

    Parameters
    ----------
    bytes
        Bytes of the artifact's files.
    counted
        What the budget counts: these bytes, or those in memory if it was made for memory.
    refused
        Sites where finer settings still fit, but did not lower the measured loss.
    """

    plan: Plan
    packed: dict[str, Packed]
    contents: Contents
    bytes: int
    counted: int
    quality: float
    p95: float | None = None
    refused: int = 0


def finish(run: Run, profile: Profile, plan: Plan, asked: Budget, *, exact: bool = True) -> Built:
    """Encode a plan and, if ``exact``, move continuous settings until the artifact uses the budget.

    Raises
    ------
    RequestError
        If a plan that must not be moved exceeds the budget.
    """
    count = run.opened.target.total
    points, packed, contents = encode_plan(run, profile, plan, asked if exact else None)
    total, label = count(contents), plan.label
    aim = asked.bytes
    for _ in range(_RETREATS if exact else 0):
        if total <= asked.bytes:
            break
        # Continuous settings could not be moved close enough. Points of known bytes hardly exceed the budget, but
        # sampled points are slightly off, and so are the entries of other forms in the manifest. The next attempt
        # leaves as much free as this one took beside its points.
        known = allocate(profile, replace(asked, bytes=aim), margin=2 * MARGIN, interpolate=False)
        points, packed, contents = encode_plan(run, profile, known, None)
        total, label = count(contents), known.label
        aim = max(asked.bytes - max(total - known.bytes, 0), profile.smallest)
    if total > asked.bytes and exact:
        raise unreachable(asked, profile.original_bytes, total)
    if total > asked.bytes:
        raise RequestError(
            f"the plan takes {total} bytes, but its budget is {asked.bytes}; choose coarser settings for some sites"
        )
    return measured(run, profile, replace(plan, points=points, label=label), packed, contents)


def measured(run: Run, profile: Profile, plan: Plan, packed: dict[str, Packed], contents: Contents) -> Built:
    """An encoded plan with its bytes and its loss on held-out data."""
    opened, target = run.opened, run.opened.target
    total = target.total(contents)
    expected = sum(profile.corrected(curve, plan.points[curve.site].loss) for curve in profile.curves)
    fixed = total - sum(map(target.bytes, packed.values()))
    done = Plan(plan.budget, plan.points, expected, fixed, plan.label, plan.notes)
    if not opened.measurable:
        return Built(done, packed, contents, contents.bytes, total, expected)
    stored = {name: kept.given for name, kept in contents.kept.items()}
    losses = run.measure(Lazily({**as_weights(opened, packed).made, **stored})).numpy()
    # A module may divide by a weight's norm: without a number, a plan is the worst.
    quality, p95 = (
        float(loss) if math.isfinite(loss) else math.inf for loss in (losses.mean(), np.quantile(losses, 0.95))
    )
    return Built(done, packed, contents, contents.bytes, total, quality, p95)


def refuse_broken(opened: Opened, built: Built) -> None:
    """Refuse a plan whose outputs are not finite.

    Raises
    ------
    RequestError
        If they are not; the error says what to do.
    """
    if opened.measurable and not math.isfinite(built.quality):
        raise RequestError(
            f"{opened.source.path or opened.source.title}: within {built.plan.budget.bytes} bytes every plan that was "
            "built gives outputs that are not finite; ask for a smaller ratio, or leave sensitive weights alone with "
            "ignore"
        )


def encode_plan(
    run: Run,
    profile: Profile,
    plan: Plan,
    asked: Budget | None,
    seen: Callable[[str, Point], None] = lambda name, point: None,
) -> tuple[dict[str, Point], dict[str, Packed], Contents]:
    """Encode a plan; with a budget, move its continuous settings until the bytes fit, if possible.

    ``seen`` is called with the name and the point of every encoded site.
    """
    opened, target = run.opened, run.opened.target
    points, packed = dict(plan.points), dict[str, Packed]()
    moved = points
    signs: set[bool] = set()
    for attempt in range(_ROUNDS):
        new, made = dict[str, Point](), dict[str, Packed]()
        try:
            for done, (name, found) in enumerate(encode_all(run, moved)):
                new[name], made[name] = replace(moved[name], bytes=target.bytes(found), estimated=False), found
                seen(name, new[name])
                run.progress("encode", done + 1, len(moved))
        except RequestError:
            if not attempt:
                raise
            # A setting between measured ones, or beyond them, may be one that the method refuses.
            break
        points, packed = {**points, **new}, {**packed, **made}
        contents = seal(opened, packed, _kept(opened, profile, points))
        total = target.total(contents)
        if asked is None or attempt == _ROUNDS - 1 or _fits(total, asked):
            break
        free = {name: point for name, point in points.items() if name not in opened.pinned}
        missing = int(asked.bytes * (1 - MARGIN / 2)) - total
        signs.add(missing > 0)
        moved = _move(profile, free, missing, alone=len(signs) > 1)
        if not moved:
            break
    return points, packed, contents


def _kept(opened: Opened, profile: Profile, points: Mapping[str, Point]) -> Narrowing:
    # If no site loses anything, other tensors must not lose anything either.
    lossless = not opened.pinned and all(point.loss == 0 for point in points.values())
    return Narrowing.EXACT if lossless else Narrowing(profile.options["kept"])


def _fits(total: int, asked: Budget) -> bool:
    return asked.bytes * (1 - 2.5 * MARGIN) <= total <= asked.bytes


def _move(profile: Profile, points: Mapping[str, Point], missing: int, *, alone: bool) -> dict[str, Point]:
    """New points with other continuous settings that change the bytes by about ``missing``.

    A small gap is closed at large such sites only: as few as a small share of their bytes allows, so that little is
    encoded again. A large gap is closed by moving all of them together, which keeps them at one slope. After an
    overshoot (coded sizes have jumps) only the largest is moved, so that sites may end on different sides of a jump.
    """
    elastic = {name: point for name, point in points.items() if get_method(point.method).elastic}
    if not elastic:
        return {}
    largest = sorted(elastic, key=lambda name: -elastic[name].bytes)
    # One site that is most of a model, such as its table, takes long to encode again, and others may do instead.
    total = sum(point.bytes for point in elastic.values())
    handy = [name for name in largest if elastic[name].bytes <= _BULKY * total]
    if _SHARE * sum(elastic[name].bytes for name in handy[: 1 if alone else None]) >= abs(missing):
        largest = handy
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
    run: Run, profile: Profile, considered: Profile, mixed: Plan, asked: Budget, *, plain: bool = False
) -> tuple[Built, Built | None]:
    """Build the mixed plan and its baselines; returns the winner and the best uniform plan.

    The rivals are the best uniform plan at the same bytes, the best plan of a single family and, if ``plain``, the
    plain method. If plans can be measured, all that may win are built and the best wins; the plan of one family comes
    last, and is left out where measurements of the others say that it loses. With preset ``fast`` only the uniform
    plan is built if it is expected to lose hardly more than the mixed one, and only the mixed one if the other is
    expected to lose far more. If plans cannot be measured, only that of least expected loss is built, and the figures
    of the others are expectations. The bytes that the winner leaves are then spent if that lowers its loss. Where the
    target rules points out for some reason (``considered``), rivals may have them, but only a plan that it admits may
    win.
    """
    opened, target = run.opened, run.opened.target
    aim = replace(asked, bytes=int(asked.bytes * (1 - target.margin)))
    even, families = best_uniform(run, profile, aim), single_families(considered, asked)
    # Of one family alone, the mixed plan is already the best.
    plans = [mixed, *even, *(families[:1] if len(_families(considered)) > 1 else [])]
    selective = opened.measurable and not target.exhaustive and opened.request.preset != "best"
    admitted = [plan for plan in plans if target.admits(profile, plan, asked)]
    if not opened.measurable:
        first = min(admitted, key=lambda plan: plan.expected, default=mixed)
        plans = [first, *(plan for plan in plans if plan is not first)]
    elif opened.request.preset == "fast":
        plans = _worth_building(opened, mixed, even, plans, admitted)
    built = [finish(run, profile, plans[0], asked)]
    for plan in plans[1:]:
        if selective and plan.label == ONE_FAMILY and not may_win(plan, built):
            continue
        if (known := _among(built, plan)) is not None:
            if plan.is_uniform and not known.plan.is_uniform:
                known.plan.label = plan.label  # choosing site by site gave one setting for all
            continue
        if not opened.measurable:
            built.append(Built(plan, {}, Contents({}), plan.bytes, plan.bytes, plan.expected))
            continue
        try:
            built.append(finish(run, profile, plan, asked))
        except OctavoError as error:
            opened.notes.append(f"the {plan.label} plan could not be built for comparison: {error}")
    if plain and opened.measurable:
        built += _plain(run, profile, asked, built)
    able = [other for other in built if target.admits(profile, other.plan, asked)] or built
    best = min(able, key=lambda other: other.quality) if opened.measurable else built[0]
    uniform = min((other for other in built if other.plan.is_uniform), key=lambda other: other.quality, default=None)
    best = topped(run, considered, best, asked)
    refuse_broken(opened, best)
    return best, uniform


def _worth_building(
    opened: Opened, mixed: Plan, even: Sequence[Plan], plans: list[Plan], admitted: Sequence[Plan]
) -> list[Plan]:
    """The plans that preset ``fast`` builds: what is not built costs nothing."""
    if any(plan.expected <= _CLOSE * mixed.expected for plan in even):
        # What a mix might gain is less than the error of its expectation.
        return list(even) if even[0] in admitted else plans
    # Where types are few, the best of them everywhere is what users know.
    judged = mixed in admitted and mixed.expected > 0 and not opened.target.exhaustive
    hopeless = [plan for plan in even if judged and plan.expected > _HOPELESS * mixed.expected]
    if hopeless:
        times = min(plan.expected for plan in hopeless) / mixed.expected
        opened.notes.append(
            f"the best uniform plan was not built: it is expected to lose {times:.1f} times as much (preset fast)"
        )
    return [plan for plan in plans if plan not in hopeless]


def may_win(plan: Plan, built: Sequence[Built]) -> bool:
    """Whether a plan is expected to lose less than those that were built, if it errs as the best of them did."""
    errs = min(other.quality / max(other.plan.expected, 1e-30) for other in built)
    return plan.expected * errs < min(other.quality for other in built)


def _plain(run: Run, profile: Profile, asked: Budget, built: Sequence[Built]) -> list[Built]:
    """Plain round-to-nearest at the same bytes, if it may win and was not built yet."""
    for plan in PlainRival(run, profile, asked).plans(min(other.quality for other in built)):
        if _among(built, plan) is not None:
            break
        try:
            return [finish(run, profile, plan, asked, exact=False)]
        except RequestError:
            continue
    return []


def topped(run: Run, profile: Profile, best: Built, asked: Budget) -> Built:
    """A built plan with its remaining bytes spent on finer settings, as far as that lowers its loss.

    Continuous settings use the budget up, so this applies only without them. All sites that can be finer are changed
    together; if that does not help, each half is tried, then halves of these.
    """
    if not run.opened.target.exhaustive and best.counted >= asked.least:
        return best

    def finer() -> list[dict[str, Point]]:
        found = dict(upgrades(profile, best.plan.points, asked.bytes - best.counted, run.opened.pinned))
        return [found] if found else []

    waiting, refused = finer(), set[str]()
    for _ in range(_TRIES):
        if not waiting:
            break
        sites = waiting.pop(0)
        plan, built = replace(best.plan, points={**best.plan.points, **sites}, label=MIXED), None
        # Sizes of large matrices are estimates, and these may be too small.
        with suppress(RequestError):
            if run.opened.target.admits(profile, plan, asked):
                built = finish(run, profile, plan, asked, exact=False)
        if built is not None and built.quality < best.quality:
            best, refused = built, set()
            waiting = finer()
            continue
        if built is not None:
            refused |= set(sites)
        if len(sites) > 1:
            items = list(sites.items())
            waiting += [dict(items[: len(items) // 2]), dict(items[len(items) // 2 :])]
    return replace(best, refused=len(refused)) if refused else best


def _among(built: Sequence[Built], plan: Plan) -> Built | None:
    """The built plan that equals a given plan."""
    return next((other for other in built if _same(plan, other.plan)), None)


def _alike(one: Plan, other: Plan) -> bool:
    """Whether all settings except continuous ones are equal."""

    def fixed(point: Point) -> Setting:
        return {**point.setting, get_method(point.method).elastic or "": 0}

    return all(fixed(point) == fixed(other.points[name]) for name, point in one.points.items())


def _same(one: Plan, other: Plan) -> bool:
    """Whether two plans differ only by the final adjustment of their continuous settings."""
    if {name: point.method for name, point in one.points.items()} != {n: p.method for n, p in other.points.items()}:
        return False
    # Different types may take equal bytes.
    return _alike(one, other) and all(
        abs(math.log((point.bytes + 1) / (other.points[name].bytes + 1))) < MARGIN for name, point in one.points.items()
    )


def single_families(profile: Profile, asked: Budget) -> list[Plan]:
    """The best plan of every single family, best expected loss first. Dense storage belongs to every family."""
    dense, plans = dense_names(), []
    for family, names in _families(profile).items():
        try:
            # Losses are only expectations: if settings are few, these plans are also a second opinion on them.
            plan = allocate(profile, asked, margin=MARGIN, methods=[*names, *dense], thorough=False)
        except BudgetError:
            continue
        plan.label, plan.notes = ONE_FAMILY, [family]
        plans.append(plan)
    return sorted(plans, key=lambda plan: plan.expected)


def _families(profile: Profile) -> dict[str, list[str]]:
    """The methods of every family that a profile has points of, without dense storage."""
    found: dict[str, list[str]] = {}
    for name in sorted({point.method for curve in profile.curves for point in curve.points} - dense_names()):
        found.setdefault(get_method(name).family, []).append(name)
    return found
