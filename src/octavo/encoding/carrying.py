"""Carrying a plan out: to its budget exactly, or to the letter if it was edited."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from octavo.allocation.budget import Budget
from octavo.allocation.plans import EDITED, Plan
from octavo.allocation.profiles import Curve, Point, Profile
from octavo.allocation.solver import labelled, unreachable
from octavo.artifact import Contents, Packed, unpack
from octavo.calibration.calibrating import Calibration
from octavo.calibration.workspace import Workspace
from octavo.encoding.finish import Built, encode_plan, measured, topped
from octavo.encoding.job import Job
from octavo.encoding.tasks import weighed
from octavo.errors import RequestError
from octavo.methods import Setting, get_method, spelled

#: Octaves by which a continuous setting is made coarser; sizes have jumps, so that less than one may free nothing.
_OCTAVES = (0.03, 0.1, 0.3, 1.0, 2.0)
#: Coarser settings of a site that are tried to free some bytes, and how often all sites are gone through.
_RUNGS, _PASSES = len(_OCTAVES), 8
#: Finer settings of a site that are tried to spend what is left.
_FINER = 2
#: Points of one method that are closer than this many octaves tell no slope, since sizes have jumps.
_APART = 0.02
#: Sites that an error names, and those that are searched for coarser settings that it can name.
_SHOWN, _SEARCHED = 3, 8


def carry_out(
    job: Job, profile: Profile, calibration: Calibration, room: Workspace, plan: Plan
) -> tuple[Built, Profile]:
    """Encode a plan of a file; returns it, and the profile with what was learned of it on the way.

    Its sizes are estimates. As it was written its continuous settings are moved until the artifact uses the budget; if
    they cannot be moved far enough, a few sites get the next coarser setting of their method, or what is left is spent
    on finer ones. An edited plan is kept as it is.

    Raises
    ------
    RequestError
        If an edited plan exceeds its budget, with the sites that take more than the plan says, and what would fit.
    BudgetError
        If no coarser settings are left.
    """
    # Nothing moves what the user chose when the plan was made.
    chosen = {name: plan.points[name] for name in plan.pinned if name in plan.points}
    job.pinned = {**job.pinned, **{name: (point.method, point.setting) for name, point in chosen.items()}}
    asked = plan.budget
    carried, stated = _Carried.of(job, profile, calibration, room, plan), plan.points
    edited = plan.label == EDITED
    plan, packed, contents = carried.encoded(plan, None if edited else asked)
    if edited and contents.counted > asked.bytes:
        raise carried.too_large(plan, stated, contents.counted)
    for _ in range(_PASSES):
        excess = contents.counted - asked.bytes
        if excess <= 0:
            built = measured(job, carried.profile, plan, packed, contents)
            if not edited and contents.counted < asked.least:
                built = topped(job, carried.with_finer(plan), calibration, room, built, asked)
            return built, carried.profile
        # A step coarser multiplies what a site loses by about four at most: it costs least where little is lost.
        order = sorted(plan.points, key=lambda name: plan.points[name].loss)
        coarser = carried.coarser(plan.points, order, excess)
        if not coarser:
            break
        plan, packed, contents = carried.encoded(replace(plan, points={**plan.points, **coarser}), None)
    raise unreachable(asked, profile.original_bytes, contents.counted)


@dataclass(frozen=True)
class _Carried:
    """What encoding the sites of a plan needs.

    Parameters
    ----------
    unprofiled
        Curves of sites that were not profiled by the plan's method, so that what is seen of them has to tell how their
        bytes depend on its settings.
    """

    job: Job
    profile: Profile
    calibration: Calibration
    room: Workspace
    unprofiled: dict[str, Curve]

    @classmethod
    def of(cls, job: Job, profile: Profile, calibration: Calibration, room: Workspace, plan: Plan) -> _Carried:
        curves = {curve.site: replace(curve, points=list(curve.points)) for curve in profile.curves}
        unprofiled = {name: curve for name, curve in curves.items() if not _profiled(curve, plan.points[name])}
        return cls(job, replace(profile, curves=list(curves.values())), calibration, room, unprofiled)

    def encoded(self, plan: Plan, asked: Budget | None) -> tuple[Plan, dict[str, Packed], Contents]:
        """A plan with the exact bytes of its points; with a budget, its continuous settings are moved to it."""

        def seen(name: str, point: Point) -> None:
            if name not in self.unprofiled or get_method(point.method).elastic is None:
                return
            known, octaves = self.unprofiled[name].points, get_method(point.method).octaves
            same = [other for other in known if _kind(other) == _kind(point)]
            if all(abs(octaves(other.setting) - octaves(point.setting)) > _APART for other in same):
                known.append(point)

        found = encode_plan(self.job, self.profile, self.calibration, self.room, plan, asked, seen)
        points, packed, contents = found
        return replace(plan, points=points), packed, contents

    def coarser(self, points: Mapping[str, Point], order: Sequence[str], excess: int) -> dict[str, Point]:
        """Coarser points that free ``excess`` bytes: of the first site that can alone, or of several in their order.

        What is returned may free less, and is empty if nothing can be freed.
        """
        found: dict[str, Point] = {}
        for name in order:
            if name in self.job.pinned:
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
        """The profile, with finer settings of sites that were not profiled, and no methods there but the plan's."""
        wanted = [
            (self.job.site(name), get_method(point.method), setting)
            for name, point in plan.points.items()
            if name in self.unprofiled and name not in self.job.pinned
            for setting in self._finer(name, point)
        ]
        evidence = self.calibration.evidence
        work = (
            (site, self.job.matrix(site), evidence[site.name], spelled(method), setting)
            for site, method, setting in wanted
        )
        for (site, method, setting), found in zip(wanted, self.job.executor.map(weighed, work), strict=True):
            if found is not None:
                packed, loss = found
                self.room.save_packed(site.name, spelled(method), setting, packed)
                point = Point(spelled(method), setting, packed.counted(self.job.target), loss)
                self.unprofiled[site.name].points.append(point)
        used = {point.method for point in plan.points.values()}

        def allowed(curve: Curve) -> Curve:
            return replace(curve, points=[point for point in curve.points if point.method in used])

        curves = [allowed(curve) if curve.site in self.unprofiled else curve for curve in self.profile.curves]
        return replace(self.profile, curves=curves)

    def _rungs(self, name: str, point: Point) -> Iterator[Point]:
        """Coarser points of a site, by the same method, with their exact bytes and their loss."""
        site, evidence = self.job.site(name), self.calibration.evidence[name]
        for setting in self._settings(name, point):
            wanted = replace(point, setting=setting)
            try:
                ((_, packed),) = self.job.encode_all({name: wanted}, self.calibration, self.room)
            except RequestError:
                continue  # a method may find that a setting does not serve here
            form = unpack(memoryview(packed.blob), packed.parts, packed.meta, (site.rows, site.columns))
            loss = evidence.loss(form.dense() - self.job.matrix(site))
            yield Point(point.method, setting, packed.counted(self.job.target), loss)

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
        site = self.job.site(name)
        method = get_method(point.method).at_site(site)
        return method.offered(self.job.matrix(site), self.calibration.evidence[name], self.job.target)

    def too_large(self, plan: Plan, stated: Mapping[str, Point], total: int) -> RequestError:
        """By how much an edited plan exceeds its budget, where, and what would fit."""
        excess = total - plan.budget.bytes
        over = {name: point.bytes - stated[name].bytes for name, point in plan.points.items()}
        order = sorted(over, key=lambda name: -over[name])
        sites = [
            f"{name!r} takes {plan.points[name].bytes} bytes, the plan says {stated[name].bytes}"
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
            f"{plan.origin}: was edited and takes {total} bytes, its budget is {plan.budget.bytes}, {excess} less"
            + "".join(f"; {site}" for site in sites)
            + (f"; {' and '.join(choices)} would fit" if freed >= excess else "")
            + f"; choose coarser settings, or a budget of {total} (ratio {ratio:g})"
        )


def _profiled(curve: Curve, point: Point) -> bool:
    """Whether a curve has points of a point's method, and where that has a continuous setting, tells its slope."""
    if get_method(point.method).elastic is None:
        return any(other.method == point.method for other in curve.points)
    return sum(_kind(other) == _kind(point) for other in curve.points) > 1


def _kind(point: Point) -> tuple[str, Setting]:
    """What points have in common that differ in a continuous setting alone."""
    return point.method, {**point.setting, get_method(point.method).elastic or "": 0}
