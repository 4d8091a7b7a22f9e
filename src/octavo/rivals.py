"""What a mixed plan must beat: one setting for all sites, and plain round-to-nearest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from octavo.allocate import Plan, labelled, uniform
from octavo.budget import Budget
from octavo.calibrate import Calibration
from octavo.evidence_folder import EvidenceFolder
from octavo.job import Job
from octavo.methods import Setting, get_method
from octavo.profile import Point, Profile, Window, envelope
from octavo.tasks import profiled, weighed
from octavo.workspace import Workspace

PLAIN = "rtn"
#: Plain round-to-nearest is not built where every site was measured and it is expected to lose so many times more.
_HOPELESS = 8.0
#: A coder may save this share of the bits of round-to-nearest's codes.
_CODED = 0.25
#: By so much of the bits asked for the sites' own bits may differ under one setting.
_SPREAD = 0.15
#: Bytes of large matrices are estimated from a sample of their rows, and miss by less than this share.
_MISS = 0.01


def best_uniform(job: Job, profile: Profile, calibration: Calibration, room: Workspace, asked: Budget) -> list[Plan]:
    """The plan of least expected loss that uses one setting everywhere; none if no single setting fits.

    A setting that was tried at most of the weights, and screened out at the others, is tried there as well where it
    could win: a rival is not weakened by what was left untried.
    """
    plans = uniform(profile, asked)
    if job.target == "memory":  # there every setting was tried
        return plans[:1]
    limit = plans[0].expected if plans else math.inf
    wanted = [
        (site, method, setting)
        for method, setting, tried in _settings(job, profile)
        for site in _gaps(job, profile, tried, asked, limit)
        if get_method(method).accepts(job.site(site))
    ]
    if not wanted:
        return plans[:1]
    evidence = calibration.evidence
    work = ((job.site(site), job.matrix(job.site(site)), evidence[site], *choice) for site, *choice in wanted)
    added: dict[str, list[Point]] = {}
    for (site, method, setting), found in zip(wanted, job.executor.map(weighed, work), strict=True):
        if found is not None:
            packed, loss = found
            room.save_packed(site, method, setting, packed)
            added.setdefault(site, []).append(Point(method, setting, packed.counted(job.target), loss))
    curves = [replace(curve, points=[*curve.points, *added.get(curve.site, [])]) for curve in profile.curves]
    return uniform(replace(profile, curves=curves), asked)[:1]


def _settings(job: Job, profile: Profile) -> list[tuple[str, Setting, dict[str, Point]]]:
    """Every method and setting, with the sites at which it was tried."""
    found: dict[tuple[str, str], tuple[str, Setting, dict[str, Point]]] = {}
    for curve in profile.curves:
        for point in curve.points if curve.site not in job.pinned else ():
            entry = (point.method, point.setting, dict[str, Point]())
            found.setdefault((point.method, repr(point.setting)), entry)[2][curve.site] = point
    return [entry for entry in found.values() if get_method(entry[0]).family != "keep"]


def _gaps(job: Job, profile: Profile, tried: Mapping[str, Point], asked: Budget, limit: float) -> list[str]:
    """Sites at which a setting was not tried, if with them it may fit and lose less than ``limit``."""
    free = [curve for curve in profile.curves if curve.site not in job.pinned]
    weights = {curve.site: job.site(curve.site).parameters for curve in free}
    seen, every = sum(weights[site] for site in tried), sum(weights.values())
    if len(tried) == len(free) or 2 * seen < every:
        return []
    share = sum(point.bytes for point in tried.values()) / seen
    if profile.fixed_bytes + share * every > asked.bytes:
        return []
    lost = 0.0
    for curve in free:
        # It was screened out for losing more than others did at its bytes.
        others = envelope(curve)
        guess = others(share * weights[curve.site]) if others else 0.0
        lost += profile.corrected(curve, tried[curve.site].loss if curve.site in tried else guess)
    return [] if lost >= limit else [curve.site for curve in free if curve.site not in tried]


class Plain:
    """Plans of plain round-to-nearest with one setting for all, the finest that fits first.

    Sites at which the setting does not apply are kept in 16 bits, pinned ones as they are pinned.
    """

    def __init__(self, job: Job, profile: Profile, calibration: Calibration, room: Workspace, asked: Budget) -> None:
        self.job, self.profile, self.calibration, self.room, self.asked = job, profile, calibration, room, asked
        free = [curve for curve in profile.curves if curve.site not in job.pinned]
        weights = sum(job.site(curve.site).parameters for curve in free)
        pinned = sum(curve.points[0].bytes for curve in profile.curves if curve.site in job.pinned)
        self.free = free
        self.bits = max(asked.bytes - profile.fixed_bytes - pinned, 0) * 8 / max(weights, 1)

    def plans(self, best: float) -> list[Plan]:
        """Those that are worth being built beside a plan that lost ``best`` on held-back data."""
        if not self.free or (self._hopeless(best) and self._measured()):
            return []
        limit = math.inf if not self._measured() else _HOPELESS * best
        tried = self._points()
        settings = {repr(point.setting): point.setting for points in tried.values() for point in points}
        plans = [plan for setting in settings.values() if (plan := self._plan(tried, setting)) is not None]
        fitting = [plan for plan in plans if plan.bytes <= self.asked.bytes * (1 + _MISS) and plan.expected <= limit]
        return sorted(fitting, key=lambda plan: -plan.bytes)

    def _measured(self) -> bool:
        """Whether calibration saw every site, so that expected losses can be compared."""
        evidence = self.calibration.evidence
        names = [curve.site for curve in self.free]
        if isinstance(evidence, EvidenceFolder):
            return all(evidence.samples.get(name, 0) for name in names)
        return all(evidence[name].samples for name in names)

    def _hopeless(self, best: float) -> bool:
        """Whether even optimistic guesses from what the profile has are far behind."""
        finest = min(int(self.bits * (1 + _CODED)), 8)
        total = 0.0
        for curve in self.free:
            points = [p for p in curve.points if p.method == PLAIN]
            if not points:
                return False
            nearest = min(points, key=lambda point: abs(point.setting["bits"] - finest))
            total += self.profile.corrected(curve, nearest.loss * 4.0 ** (nearest.setting["bits"] - finest))
        return total > _HOPELESS * best

    def _points(self) -> dict[str, list[Point]]:
        """Round-to-nearest's points of all sites around the size asked for, screened by nothing."""
        job, room = self.job, self.room
        if job.target == "memory":  # there every setting was tried
            return {curve.site: [p for p in curve.points if p.method == PLAIN] for curve in self.free}
        sites, methods = [job.site(curve.site) for curve in self.free], [get_method(PLAIN)]
        window = Window(self.bits * (1 - _SPREAD), self.bits * (1 + _SPREAD))
        evidence = self.calibration.evidence
        work = ((site, job.matrix(site), evidence[site.name], methods, window, None, job.target) for site in sites)
        found = {}
        for site, (curve, made, _) in zip(sites, job.executor.map(profiled, work), strict=True):
            for method, setting, packed in made:
                room.save_packed(site.name, method, setting, packed)
            found[site.name] = curve.points
        return found

    def _plan(self, tried: Mapping[str, Sequence[Point]], setting: Setting) -> Plan | None:
        """The plan of one setting; None if a site can have neither it nor 16 bits."""
        points = {}
        for curve in self.profile.curves:
            exact = [point for point in tried.get(curve.site, ()) if point.setting == setting]
            half = [p for p in curve.points if p.method == "keep" and p.setting["dtype"] != "float32"]
            pinned = curve.points if curve.site in self.job.pinned else []
            allowed = pinned or exact or sorted(half, key=lambda point: point.loss)
            if not allowed:
                return None
            points[curve.site] = allowed[0]
        expected = sum(self.profile.corrected(curve, points[curve.site].loss) for curve in self.profile.curves)
        return Plan(self.asked, points, expected, self.profile.fixed_bytes, labelled(PLAIN, setting))
