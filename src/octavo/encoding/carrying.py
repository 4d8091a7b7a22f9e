"""Encoding a plan from a file: to its exact budget, or unchanged if it was edited."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from octavo.allocation.budget import Budget
from octavo.allocation.encoded import encode_all, form_of
from octavo.allocation.opened import Run
from octavo.allocation.plans import EDITED, Plan
from octavo.allocation.profiles import Curve, Point, Profile
from octavo.allocation.solver import labelled, unreachable
from octavo.allocation.tasks import weighed
from octavo.artifact import Contents, Packed
from octavo.encoding.finish import Built, encode_plan, measured, refuse_broken, topped
from octavo.errors import RequestError
from octavo.methods import Setting, get_method

#: Octaves by which a continuous setting is made coarser; sizes have jumps, so less than one octave may free nothing.
_OCTAVES = (0.03, 0.1, 0.3, 1.0, 2.0)
#: Coarser settings of a site tried to free bytes, and the number of passes over all sites.
_RUNGS, _PASSES = len(_OCTAVES), 8
#: Finer settings of a site tried to spend the remaining bytes.
_FINER = 2
#: Points of one method closer than this many octaves give no slope, since sizes have jumps.
_APART = 0.02
#: Number of sites named in an error, and of sites searched for coarser settings to suggest.
_SHOWN, _SEARCHED = 3, 8


def pinned_by(run: Run, plan: Plan) -> Run:
    """The run with what the user chose when a plan was made: nothing moves it."""
    chosen = {name: plan.points[name] for name in plan.pinned if name in plan.points}
    pinned = {**run.opened.pinned, **{name: (point.method, point.setting) for name, point in chosen.items()}}
    return replace(run, opened=replace(run.opened, pinned=pinned))


def carry_out(run: Run, profile: Profile, plan: Plan) -> tuple[Built, Profile]:
    """Encode a plan from a file; returns the built plan and the profile with the points measured on the way.

    The sizes in the file are estimates. Continuous settings of an unedited plan are moved until the artifact uses the
    budget. If that is not enough, a few sites get the next coarser setting of their method, or the remaining bytes are
    spent on finer ones. An edited plan is kept unchanged.

    Raises
    ------
    RequestError
        If an edited plan exceeds its budget; names the sites that exceed the plan, and settings that would fit.
    BudgetError
        If no coarser settings are left.
    """
    asked, count = plan.budget, run.opened.target.total
    carried, stated = _Carried.of(run, profile, plan), plan.points
    edited = plan.label == EDITED
    plan, packed, contents = carried.encoded(plan, None if edited else asked)
    total = count(contents)
    if edited and total > asked.bytes:
        raise carried.too_large(plan, stated, total)
    for _ in range(_PASSES):
        excess = total - asked.bytes
        if excess <= 0:
            built = measured(run, carried.profile, plan, packed, contents)
            if not edited and total < asked.least:
                built = topped(run, carried.with_finer(plan), built, asked)
            refuse_broken(run.opened, built)
            return built, carried.profile
        # One step coarser multiplies a site's loss by at most about four: it costs least where the loss is small.
        order = sorted(plan.points, key=lambda name: plan.points[name].loss)
        coarser = carried.coarser(plan.points, order, excess)
        if not coarser:
            break
        plan, packed, contents = carried.encoded(replace(plan, points={**plan.points, **coarser}), None)
        total = count(contents)
    raise unreachable(asked, profile.original_bytes, total)


@dataclass(frozen=True)
class _Carried:
    """Everything needed to encode the sites of a plan.

    Parameters
    ----------
    unprofiled
        Curves of sites that were not profiled with the plan's method: points encoded here show how their bytes depend
        on its settings.
    """

    run: Run
    profile: Profile
    unprofiled: dict[str, Curve]

    @classmethod
    def of(cls, run: Run, profile: Profile, plan: Plan) -> _Carried:
        curves = {curve.site: replace(curve, points=list(curve.points)) for curve in profile.curves}
        unprofiled = {name: curve for name, curve in curves.items() if not _profiled(curve, plan.points[name])}
        return cls(run, replace(profile, curves=list(curves.values())), unprofiled)

    def encoded(self, plan: Plan, asked: Budget | None) -> tuple[Plan, dict[str, Packed], Contents]:
        """A plan with the exact bytes of its points; with a budget, its continuous settings are moved to meet it."""

        def seen(name: str, point: Point) -> None:
            if name not in self.unprofiled or get_method(point.method).elastic is None:
                return
            known, octaves = self.unprofiled[name].points, get_method(point.method).octaves
            same = [other for other in known if _kind(other) == _kind(point)]
            if all(abs(octaves(other.setting) - octaves(point.setting)) > _APART for other in same):
                known.append(point)

        found = encode_plan(self.run, self.profile, plan, asked, seen)
        points, packed, contents = found
        return replace(plan, points=points), packed, contents

    def coarser(self, points: Mapping[str, Point], order: Sequence[str], excess: int) -> dict[str, Point]:
        """Coarser points that free ``excess`` bytes: of the first site that suffices alone, or of several in order.

        The result may free less, and is empty if nothing can be freed.
        """
        found: dict[str, Point] = {}
        for name in order:
            if name in self.run.opened.pinned:
                continue
            for point in islice(self._rungs(name, points[name]), _RUNGS):
                if points[name].bytes - point.bytes >= excess:
                    return {name: point}
                if point.bytes < found.get(name, points[name]).bytes:
                    found[name] = point
        taken: dict[str, Point] = {}
        for name, point in found.items():
            if excess <= 0:
                break
            excess -= points[name].bytes - point.bytes
            taken[name] = point
        return taken

    def with_finer(self, plan: Plan) -> Profile:
        """The profile with finer settings of unprofiled sites, where only the plan's methods are used."""
        wanted = [
            (self.run.opened.site(name), get_method(point.method), setting)
            for name, point in plan.points.items()
            if name in self.unprofiled and name not in self.run.opened.pinned
            for setting in self._finer(name, point)
        ]
        evidence = self.run.calibration.evidence
        work = (
            (site, self.run.opened.matrix(site), evidence[site.name], str(method), setting, self.run.opened.target)
            for site, method, setting in wanted
        )
        for (site, method, setting), found in zip(wanted, self.run.executor.map(weighed, work), strict=True):
            if found is not None:
                packed, loss = found
                self.run.workspace.save_packed(site.name, str(method), setting, packed)
                point = Point(str(method), setting, self.run.opened.target.bytes(packed), loss)
                self.unprofiled[site.name].points.append(point)
        used = {point.method for point in plan.points.values()}

        def allowed(curve: Curve) -> Curve:
            return replace(curve, points=[point for point in curve.points if point.method in used])

        curves = [allowed(curve) if curve.site in self.unprofiled else curve for curve in self.profile.curves]
        return replace(self.profile, curves=curves)

    def _rungs(self, name: str, point: Point) -> Iterator[Point]:
        """Coarser points of a site, by the same method, with their exact bytes and their loss."""
        site, evidence = self.run.opened.site(name), self.run.calibration.evidence[name]
        for setting in self._settings(name, point):
            wanted = replace(point, setting=setting)
            try:
                ((_, packed),) = encode_all(self.run, {name: wanted})
            except RequestError:
                continue  # a method may find that a setting is not usable here
            form = form_of(site, packed)
            loss = evidence.loss(form.dense() - self.run.opened.matrix(site))
            yield Point(point.method, setting, self.run.opened.target.bytes(packed), loss)

    def _settings(self, name: str, point: Point) -> Iterator[Setting]:
        method = get_method(point.method)
        if method.elastic is not None:
            place = method.octaves(point.setting)
            moved = (method.at(point.setting, place + octaves) for octaves in _OCTAVES)
            yield from (setting for setting in moved if setting != point.setting)
        offered = self._offered(name, point)
        start = offered.index(point.setting) + 1 if point.setting in offered else 0
        yield from offered[start:]

    def _finer(self, name: str, point: Point) -> list[Setting]:
        offered, method = self._offered(name, point), get_method(point.method)
        if point.setting in offered:
            return offered[: offered.index(point.setting)][-_FINER:]
        if method.elastic is not None:
            place = method.octaves(point.setting)
            offered = [setting for setting in offered if method.octaves(setting) < place]
        return offered[-_FINER:]

    def _offered(self, name: str, point: Point) -> list[Setting]:
        site = self.run.opened.site(name)
        method = get_method(point.method).at_site(site)
        return list(
            self.run.opened.target.offers(method, self.run.opened.matrix(site), self.run.calibration.evidence[name])
        )

    def too_large(self, plan: Plan, stated: Mapping[str, Point], total: int) -> RequestError:
        """The error for an edited plan over its budget: the excess, the sites, and settings that would fit."""
        excess = total - plan.budget.bytes
        over = {name: point.bytes - stated[name].bytes for name, point in plan.points.items()}
        order = sorted(over, key=lambda name: -over[name])
        sites = [
            f"{name!r} takes {plan.points[name].bytes} bytes, but the plan states {stated[name].bytes}"
            for name in order[:_SHOWN]
            if over[name] > 0
        ]
        coarser = self.coarser(plan.points, order[:_SEARCHED], excess)
        freed = sum(plan.points[name].bytes - point.bytes for name, point in coarser.items())
        choices = [
            f"{name!r} {labelled(point.method, point.setting)} ({point.bytes} bytes)" for name, point in coarser.items()
        ]
        ratio = math.floor(self.profile.original_bytes / total * 100) / 100
        return RequestError(
            f"{plan.origin}: the edited plan takes {total} bytes, {excess} more than its budget of {plan.budget.bytes}"
            + "".join(f"; {site}" for site in sites)
            + (f"; {' and '.join(choices)} would fit" if freed >= excess else "")
            + f"; choose coarser settings, or a budget of {total} (ratio {ratio:g})"
        )


def _profiled(curve: Curve, point: Point) -> bool:
    """Whether a curve has points of the point's method and, for a continuous setting, determines its slope."""
    if get_method(point.method).elastic is None:
        return any(other.method == point.method for other in curve.points)
    return sum(_kind(other) == _kind(point) for other in curve.points) > 1


def _kind(point: Point) -> tuple[str, Setting]:
    """The key shared by points that differ only in a continuous setting."""
    return point.method, {**point.setting, get_method(point.method).elastic or "": 0}
