"""The curves of a whole source, and their correction by measured plans."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from octavo.allocation.budget import Budget
from octavo.allocation.encoded import as_weights, encode_all, narrowing_of, seal
from octavo.allocation.opened import Run
from octavo.allocation.profiles import Curve, Point, Profile
from octavo.allocation.screening import kind_of, pilots, reaches
from octavo.allocation.solver import allocate
from octavo.allocation.tasks import profiled
from octavo.allocation.windows import Window
from octavo.artifact import Packed, Sized
from octavo.sources.sites import Site

#: Every n-th setting of a continuous knob is tried, within this range around the requested bits.
_STRIDE = {"fast": 2}
_SPREAD = {"fast": (0.45, 1.9), "best": (0.1, 4.0)}
#: Where expected losses are corrected, as shares of the size, with a budget and for all sizes.
_AT_BUDGET, _AT_ALL = (1.0,), (1.0, 0.6)
#: Presets that try everything at every site.
_COMPLETE = ("best",)


def window_of(bits: float | None, preset: str) -> Window:
    """The range of sizes for which points are computed; None for all."""
    if bits is None:
        return Window()
    spread = _SPREAD.get(preset, (0.25, 2.5))
    # Near the smallest artifact every site needs its coarsest point.
    least = 0.0 if bits < 1 else bits * spread[0]
    around = bits if bits > 0 and preset not in _COMPLETE else None
    return Window(least, max(bits * spread[1], 6.0), _STRIDE.get(preset, 1), around)


def build_profile(run: Run, bits: float | None, *, corrected: bool = True) -> Profile:
    """The curves of all sites and their correction by measured plans; finished sites are read from the workspace.

    Points are computed around ``bits`` per weight; None computes all. Without ``corrected`` nothing is measured to
    correct expected losses.
    """
    opened, room, target = run.opened, run.workspace, run.opened.target
    preset = opened.request.preset
    window = window_of(bits, preset)
    saved = room.read_json("profile.json", again=True)
    if saved is not None and saved.get("options", {}).get("bits") in (None, bits):
        return Profile.load(room.path / "profile.json")
    found, smallest = dict[str, Curve](), dict[str, Packed]()
    for curve, packed in _measured(run, window, bits):
        found[curve.site], smallest[curve.site] = curve, packed
        run.progress("profile", len(found), len(opened.sites))
    curves = [found[site.name] for site in opened.sites]
    smallest = {curve.site: smallest[curve.site] for curve in curves}
    narrowing = narrowing_of(run)
    source = opened.source
    profile = Profile(source.title, source.fingerprint(), source.original_bytes, source.weights, 0, curves)
    profile.options = {"bits": bits, "preset": preset, "kept": narrowing.value, "target": target.name}
    profile.options["pinned"] = sorted(opened.pinned)
    joined = target.joined(opened.sites)
    if joined:
        profile.options["joined"] = joined
    profile.fixed_bytes = target.total(seal(opened, smallest, narrowing)) - sum(map(target.bytes, smallest.values()))
    if corrected and opened.measurable and preset != "fast":
        correct(run, profile, bits or 4.0, _AT_BUDGET if window.bits else _AT_ALL)
    profile.save(room.path / "profile.json")
    return profile


def _measured(run: Run, window: Window, bits: float | None) -> Iterator[tuple[Curve, Packed]]:
    """The curve of every site, from the workspace if it is there, and the site's smallest form without content.

    Where a budget is known some sites come first, and show what is worth trying at the others.
    """
    opened, target = run.opened, run.opened.target
    names = [f"curves/{index:05d}{'' if bits is None else f'-{bits:.6g}'}.json" for index in range(len(opened.sites))]
    places = list(zip(opened.sites, names, strict=True))
    first = {site.name for site in opened.sites}
    if window.bits is not None and not target.exhaustive and not target.joined(opened.sites):
        first = pilots(opened.sites, opened.pinned) | set(opened.pinned)
    found: list[Curve] = []
    for curve, packed in _curves(run, [place for place in places if place[0].name in first], lambda site: window):
        found.append(curve)
        yield curve, packed
    others = [place for place in places if place[0].name not in first]
    if not others:
        return
    free = [site for site in opened.sites if site.name not in opened.pinned]
    reach = reaches([curve for curve in found if curve.site not in opened.pinned], free, window.bits or 0.0)
    yield from _curves(run, others, lambda site: replace(window, reach=reach[kind_of(site)]))


def _curves(
    run: Run, places: Sequence[tuple[Site, str]], window: Callable[[Site], Window]
) -> Iterator[tuple[Curve, Packed]]:
    """Curves of some sites, each with the name of its file."""
    opened, room = run.opened, run.workspace
    found = [room.read_json(name, again=True) for _, name in places]
    missing = [site for (site, _), saved in zip(places, found, strict=True) if saved is None]
    results = run.executor.map(
        profiled,
        (
            (
                site,
                opened.matrix(site),
                run.calibration.evidence[site.name],
                opened.methods,
                window(site),
                opened.pinned.get(site.name),
                opened.target,
            )
            for site in missing
        ),
    )
    for (site, name), saved in zip(places, found, strict=True):
        if saved is None:
            curve, made, outline = next(results)
            for method, setting, packed in made:
                room.save_packed(site.name, method, setting, packed)
            entries = [[p.method, p.setting, p.bytes, p.loss, p.estimated] for p in curve.points]
            described = [outline.bytes, outline.crc, outline.parts, outline.meta, outline.codecs, outline.resident]
            # Always continue with the values read back, so that a resumed run equals an uninterrupted one.
            saved = json.loads(json.dumps({"points": entries, "smallest": described}))
            room.write_json(name, saved)
        length, crc, *described = saved["smallest"]
        points = [Point(*entry) for entry in saved["points"]]
        yield Curve(site.name, site.kind, site.shape, points), Packed(Sized(length, crc), *described)


def correct(run: Run, profile: Profile, bits: float, shares: Sequence[float]) -> None:
    """Measure how well expected losses predict: compress one group of sites at a time, at one size or several.

    The measured loss of a group is fitted as ``factor * expected ** exponent`` through the points, with an exponent of
    one through a single point. Groups whose loss is too small to matter keep the expectation.

    Parameters
    ----------
    bits
        The size in bits per weight.
    shares
        The sizes that are compressed to, as shares of it.
    """
    groups: dict[str, list[Curve]] = {}
    for curve in profile.curves:
        groups.setdefault(curve.group, []).append(curve)
    plans = []
    for share in shares:
        size = max(int(run.opened.source.elements * bits * share / 8), profile.smallest)
        plans.append(allocate(profile, Budget(size, "correction")))
    total = max(plan.expected for plan in plans)
    for done, (name, curves) in enumerate(groups.items()):
        pairs: list[tuple[float, float]] = []
        for plan in plans:
            nearest = {curve.site: _nearest(curve, plan.points[curve.site]) for curve in curves}
            expected = sum(point.loss for point in nearest.values())
            if expected <= 1e-3 * total:
                continue
            packed = dict(encode_all(run, nearest))
            pairs.append((expected, float(run.measure(as_weights(run.opened, packed)).mean()) - run.at_rest))
        profile.correction[name] = fit_power(pairs)
        run.progress("correct", done + 1, len(groups))


def _nearest(curve: Curve, wanted: Point) -> Point:
    """The measured point of a curve closest to a point that may be estimated."""
    same = [point for point in curve.points if point.method == wanted.method]
    return min(same, key=lambda point: abs(math.log((point.bytes + 1) / (wanted.bytes + 1))))


def fit_power(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Factor and exponent of ``measured = factor * expected ** exponent``, fitted to one or two pairs."""
    usable = [(expected, measured) for expected, measured in pairs if expected > 0 and measured > 0]
    if not usable:
        return 1.0, 1.0
    (x1, y1), (x2, y2) = (np.log(usable[0]), np.log(usable[-1]))
    # An exponent far from 1 is noise of a small sample; it would diverge outside the measured range.
    exponent = float(np.clip((y2 - y1) / (x2 - x1), 0.8, 1.25)) if abs(x2 - x1) > 0.1 else 1.0
    return float(np.exp((y1 + y2) / 2 - exponent * (x1 + x2) / 2)), exponent
