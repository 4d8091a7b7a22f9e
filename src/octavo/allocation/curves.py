"""The curves of a whole source, and their correction by measured plans."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence

import numpy as np

from octavo.allocation.budget import Budget
from octavo.allocation.encoded import as_weights, encode_all, narrowing_of, seal
from octavo.allocation.opened import Run
from octavo.allocation.profiles import Curve, Point, Profile, Window
from octavo.allocation.solver import allocate
from octavo.allocation.tasks import profiled
from octavo.artifact import Packed, Sized

#: Every n-th setting of a continuous knob is tried, within this range around the requested bits.
_STRIDE = {"fast": 2}
_SPREAD = {"fast": (0.45, 1.9), "best": (0.1, 4.0)}


def window_of(bits: float | None, preset: str) -> Window:
    """The range of sizes for which points are computed; None for all."""
    if bits is None:
        return Window()
    spread = _SPREAD.get(preset, (0.25, 2.5))
    # Near the smallest artifact every site needs its coarsest point.
    least = 0.0 if bits < 1 else bits * spread[0]
    return Window(least, max(bits * spread[1], 6.0), _STRIDE.get(preset, 1))


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
    curves, smallest = [], dict[str, Packed]()
    for curve, packed in _measured(run, window, bits):
        curves.append(curve)
        smallest[curve.site] = packed
        run.progress("profile", len(curves), len(opened.sites))
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
        correct(run, profile, bits or 4.0)
    profile.save(room.path / "profile.json")
    return profile


def _measured(run: Run, window: Window, bits: float | None) -> Iterator[tuple[Curve, Packed]]:
    """The curve of every site, from the workspace if it is there, and the site's smallest form without content."""
    opened, room = run.opened, run.workspace
    names = [f"curves/{index:05d}{'' if bits is None else f'-{bits:.6g}'}.json" for index in range(len(opened.sites))]
    found = [room.read_json(name, again=True) for name in names]
    missing = [site for site, saved in zip(opened.sites, found, strict=True) if saved is None]
    results = run.executor.map(
        profiled,
        (
            (
                site,
                opened.matrix(site),
                run.calibration.evidence[site.name],
                opened.methods,
                window,
                opened.pinned.get(site.name),
                opened.target,
            )
            for site in missing
        ),
    )
    for site, name, saved in zip(opened.sites, names, found, strict=True):
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


def correct(run: Run, profile: Profile, bits: float) -> None:
    """Measure how well expected losses predict: compress one group of sites at a time, at two sizes.

    The measured loss of a group is fitted as ``factor * expected ** exponent`` through the two points. Groups whose
    loss is too small to matter keep the expectation.
    """
    groups: dict[str, list[Curve]] = {}
    for curve in profile.curves:
        groups.setdefault(curve.group, []).append(curve)
    plans = []
    for share in (1.0, 0.6):
        size = max(int(run.opened.source.elements * bits * share / 8), profile.smallest)
        plans.append(allocate(profile, Budget(size, "correction")))
    total = max(plan.expected for plan in plans)
    for done, (name, curves) in enumerate(groups.items()):
        pairs = []
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
