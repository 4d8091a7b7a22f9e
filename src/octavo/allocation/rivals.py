"""Baselines that a mixed plan must beat: one setting for all sites, and the plain method."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from octavo.allocation.budget import Budget
from octavo.allocation.opened import Opened, Run
from octavo.allocation.plans import Plan
from octavo.allocation.profiles import Curve, Point, Profile, envelope
from octavo.allocation.solver import labelled, uniform
from octavo.allocation.tasks import weighed
from octavo.calibration.evidence_folder import EvidenceFolder
from octavo.methods import Setting, get_method
from octavo.methods.selecting import dense_names, plain_method

#: If every site was measured, the plain method is skipped when its expected loss is this many times larger.
_HOPELESS = 8.0
#: Entropy coding may save this share of the bits of its codes.
_CODED = 0.25


def best_uniform(run: Run, profile: Profile, asked: Budget) -> list[Plan]:
    """The uniform plan (one setting everywhere) of least expected loss; None if no single setting fits.

    A setting that was tried for most weights and screened out for the rest is tried there too if it could win. So
    screening never weakens a rival.
    """
    opened, plans = run.opened, uniform(profile, asked)
    if opened.target.exhaustive:  # every setting was tried
        return plans[:1]
    limit = plans[0].expected if plans else math.inf
    wanted = [
        (site, method, setting)
        for method, setting, tried in _settings(opened, profile)
        for site in _gaps(opened, profile, tried, asked, limit)
        if get_method(method).accepts(opened.site(site))
    ]
    if not wanted:
        return plans[:1]
    evidence = run.calibration.evidence
    sites, target = {site: opened.site(site) for site, *_ in wanted}, opened.target
    work = ((sites[site], opened.matrix(sites[site]), evidence[site], *choice, target) for site, *choice in wanted)
    added: dict[str, list[Point]] = {}
    for (site, method, setting), found in zip(wanted, run.executor.map(weighed, work), strict=True):
        if found is not None:
            packed, loss = found
            run.workspace.save_packed(site, method, setting, packed)
            added.setdefault(site, []).append(Point(method, setting, opened.target.bytes(packed), loss))
    curves = [replace(curve, points=[*curve.points, *added.get(curve.site, [])]) for curve in profile.curves]
    return uniform(replace(profile, curves=curves), asked)[:1]


def _settings(opened: Opened, profile: Profile) -> list[tuple[str, Setting, dict[str, Point]]]:
    """Every method and setting, with the sites where it was tried."""
    found: dict[tuple[str, str], tuple[str, Setting, dict[str, Point]]] = {}
    for curve in profile.curves:
        for point in curve.points if curve.site not in opened.pinned else ():
            entry = (point.method, point.setting, dict[str, Point]())
            found.setdefault((point.method, repr(point.setting)), entry)[2][curve.site] = point
    return [entry for entry in found.values() if not get_method(entry[0]).dense]


def _gaps(opened: Opened, profile: Profile, tried: Mapping[str, Point], asked: Budget, limit: float) -> list[str]:
    """Sites where a setting was not tried, if with them it may fit and lose less than ``limit``."""
    free = [curve for curve in profile.curves if curve.site not in opened.pinned]
    weights = {curve.site: opened.site(curve.site).parameters for curve in free}
    seen, every = sum(weights[site] for site in tried), sum(weights.values())
    if len(tried) == len(free) or 2 * seen < every:
        return []
    share = sum(point.bytes for point in tried.values()) / seen
    if profile.fixed_bytes + share * every > asked.bytes:
        return []
    lost = 0.0
    for curve in free:
        # It was screened out because others lost less at the same bytes.
        others = envelope(curve)
        guess = others(share * weights[curve.site]) if others else 0.0
        lost += profile.corrected(curve, tried[curve.site].loss if curve.site in tried else guess)
    return [] if lost >= limit else [curve.site for curve in free if curve.site not in tried]


class PlainRival:
    """The plain method with the finest single setting that fits.

    Sites where the setting does not apply are kept in 16 bits; pinned sites stay pinned.
    """

    def __init__(self, run: Run, profile: Profile, asked: Budget) -> None:
        self.run, self.opened, self.profile, self.asked = run, run.opened, profile, asked
        self.method = plain_method()
        pinned_sites = self.opened.pinned
        self.free = [curve for curve in profile.curves if curve.site not in pinned_sites]
        weights = sum(self.opened.site(curve.site).parameters for curve in self.free)
        pinned = sum(curve.points[0].bytes for curve in profile.curves if curve.site in pinned_sites)
        self.bits = max(asked.bytes - profile.fixed_bytes - pinned, 0) * 8 / max(weights, 1)

    def plans(self, best: float) -> Iterator[Plan]:
        """Plans that fit, as long as they may beat a plan with the loss ``best``.

        Manifest entries differ by a few bytes, so a plan that should just fit may not.
        """
        limit = _HOPELESS * best if self._measured() else math.inf
        if not self.free or self._guess() > limit:
            return
        for setting in self._settings():
            plan = self._with(setting)
            if plan is not None and plan.expected > limit:
                return  # coarser ones lose more
            if plan is not None and plan.bytes <= self.asked.bytes:
                yield plan

    def _measured(self) -> bool:
        """Whether calibration saw every site, so that expected losses can be compared."""
        evidence = self.run.calibration.evidence
        names = [curve.site for curve in self.free]
        if isinstance(evidence, EvidenceFolder):
            return all(evidence.samples.get(name, 0) for name in names)
        return all(evidence[name].samples for name in names)

    def _guess(self) -> float:
        """A lower bound of its expected loss from the profile; zero if the profile has too few points."""
        finest = min(int(self.bits * (1 + _CODED)), 8)
        total = 0.0
        for curve in self.free:
            points = self._points(curve)
            if not points:
                return 0.0
            nearest = min(points, key=lambda point: abs(self._bits(point.setting) - finest))
            total += self.profile.corrected(curve, nearest.loss * 4.0 ** (self._bits(nearest.setting) - finest))
        return total

    def _points(self, curve: Curve) -> list[Point]:
        return [point for point in curve.points if point.method == self.method.name]

    def _bits(self, setting: Setting) -> float:
        return self.method.fineness(setting)[0]

    def _settings(self) -> list[Setting]:
        """Settings that may fit, finest first."""
        if self.opened.target.exhaustive:
            points = [point for curve in self.free for point in self._points(curve)]
            # Not all are offered everywhere.
            found = {repr(point.setting): point.setting for point in points}
            return sorted(found.values(), key=self.method.fineness, reverse=True)
        site = self.opened.site(self.free[0].site)
        settings = self.method.settings(self.opened.matrix(site), self.run.calibration.evidence[site.name])
        return [setting for setting in settings if self._bits(setting) <= self.bits * (1 + _CODED)]

    def _with(self, setting: Setting) -> Plan | None:
        """The plan of one setting; None if a site supports neither it nor 16 bits."""
        points = {curve.site: curve.points[0] for curve in self.profile.curves if curve.site in self.opened.pinned}
        points |= self._tried(setting)
        dense = dense_names()
        for curve in self.free:
            if curve.site not in points:
                most = 2 * math.prod(curve.shape)
                half = [p for p in curve.points if p.method in dense and p.bytes <= most]
                if not half:
                    return None
                points[curve.site] = min(half, key=lambda point: point.loss)
        expected = sum(self.profile.corrected(curve, points[curve.site].loss) for curve in self.profile.curves)
        return Plan(self.asked, points, expected, self.profile.fixed_bytes, labelled(self.method.name, setting))

    def _tried(self, setting: Setting) -> dict[str, Point]:
        """Points of a setting at all sites that offer it, from the profile or else encoded."""
        opened, evidence = self.opened, self.run.calibration.evidence
        # Where every setting was tried sizes are exact, though losses may be of a sample.
        found = {
            curve.site: point
            for curve in self.free
            for point in self._points(curve)
            if point.setting == setting and (not point.estimated or opened.target.exhaustive)
        }
        if opened.target.exhaustive:
            return found
        sites, name = [opened.site(curve.site) for curve in self.free if curve.site not in found], self.method.name
        work = ((site, opened.matrix(site), evidence[site.name], name, setting, opened.target) for site in sites)
        for site, made in zip(sites, self.run.executor.map(weighed, work), strict=True):
            if made is not None:
                packed, loss = made
                self.run.workspace.save_packed(site.name, name, setting, packed)
                found[site.name] = Point(name, setting, opened.target.bytes(packed), loss)
        return found
