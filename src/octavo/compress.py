"""The way through: source, sites, evidence, profile, plan, forms, artifact, verified."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from octavo import job as jobs
from octavo.allocate import Plan, allocate, load_plan, uniform, unreachable
from octavo.artifact import Contents, Packed, pack
from octavo.budget import Budget
from octavo.budget import budget as budget_of
from octavo.calibrate import Calibration, Evidence, data_free
from octavo.errors import BudgetError, OctavoError, RequestError
from octavo.job import Job, Progress, silent
from octavo.methods import get_method, select_methods
from octavo.objective import Objective
from octavo.profile import Curve, Point, Profile, Window, profile_site
from octavo.sites import SMALLEST_SITE, Site, Source
from octavo.workspace import Workspace, hash_tensors

#: Texts read at most, and settings skipped, by preset.
_TEXTS = {"fast": 128, "default": 384, "best": None}
_STRIDE = {"fast": 2, "default": 1, "best": 1}
#: Interpolated points miss their bytes by a little: plans aim this share below the budget and are finished exactly.
_MARGIN = 0.004
_ROUNDS = 8
#: Budgets of fewer bits per weight are checked for being reachable before anything else.
_SUSPICIOUS = 0.6
#: Bytes of a tensor's entries in manifest and header, roughly.
_ENTRY = 256
#: Below this share of the smallest artifact found without data, a budget is refused at once.
_SURE = 0.9


@dataclass
class Built:
    """A plan that was encoded: its exact contents and what it lost on held-back data."""

    plan: Plan
    packed: dict[str, Packed]
    contents: Contents
    bytes: int
    quality: float
    p95: float | None = None


@dataclass
class Compressed:
    """A finished compression, to be saved.

    Parameters
    ----------
    built
        The best of the plans that were measured; ``rival`` is the best uniform plan at the same bytes, if it is another.
    """

    job: Job
    profile: Profile
    calibration: Calibration
    budget: Budget
    built: Built
    rival: Built | None
    preset: str
    timings: dict[str, float] = field(default_factory=dict)
    command: str = ""
    workspace: Path | None = None

    @property
    def ratio(self) -> float:
        """Original bytes over artifact bytes."""
        return self.job.source.original_bytes / self.built.bytes

    def save(self, path: str | Path, *, overwrite: bool = False) -> dict[str, Any]:
        """Write the artifact, read it back, measure it, write the report; returns the report's data."""
        from octavo.verify import save

        return save(self, Path(path), overwrite=overwrite)

    def forget_workspace(self) -> None:
        """Remove the folder of unfinished work, once it is finished."""
        if self.workspace is not None:
            shutil.rmtree(self.workspace, ignore_errors=True)


def compress(
    source: str | Path | nn.Module | Source,
    *,
    ratio: float | None = None,
    size: str | int | None = None,
    bits: float | None = None,
    data: Any = None,
    objective: str | Objective | None = None,
    methods: Sequence[str] | None = None,
    preset: str = "default",
    ignore: Iterable[str] = (),
    keep: Mapping[str, str] | None = None,
    plan: str | Path | None = None,
    workspace: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> Compressed:
    """Compress a source to the size asked for.

    Parameters
    ----------
    source
        A ``transformers`` folder, a ``.safetensors`` file or index, or any module.
    ratio, size, bits
        The budget, exactly one of them: original bytes over artifact bytes, bytes (``"11MB"``), or bits per weight.
    data
        A file or list of texts for a text model, or an iterable of batches that the module takes. Without any, the
        built-in English text serves a text model, and other sources are compressed without data.
    objective
        ``cosine``, ``kl``, ``squared`` or an :class:`~octavo.objective.Objective`; chosen by the source if not given.
    methods
        Names of methods or families to use; those of the preset if not given.
    preset
        ``fast``, ``default`` or ``best``.
    ignore, keep
        Globs of site names to leave alone, and a mapping of globs to choices such as ``float16`` or ``gptq:bits=4``.
    plan
        A plan file to carry out instead of allocating.
    workspace
        Folder for unfinished work or a saved profile; a temporary one if not given.
    resume
        Use finished steps found in ``workspace``.

    Returns
    -------
    Compressed
        Call ``save(path)`` on it.

    Raises
    ------
    RequestError
        If something about the request or the source cannot be served.
    BudgetError
        If the budget cannot be reached.
    """
    clock = _Clock()
    job = open_job(source, data, objective, methods, preset, ignore, keep or {}, seed, progress)
    asked = _budget(job, plan, ratio, size, bits)
    refuse_unreachable(job, asked)
    # A killed run leaves its workspace to be resumed, and a temporary one to be swept: never both.
    with nullcontext(workspace) if workspace else tempfile.TemporaryDirectory(prefix="octavo-") as folder:
        clock.lap("open")
        room = Workspace(Path(folder), describe(job, preset), resume=resume)
        calibration = job.calibrate(room)
        clock.lap("evidence")
        profile = build_profile(job, calibration, room, asked.bytes * 8 / job.source.weights, preset)
        if profile.smallest > asked.bytes:
            # Settings far coarser than the budget were not tried; what can be reached at all depends on them.
            profile = build_profile(job, calibration, room, 0.0, preset)
        clock.lap("profile")
        chosen = load_plan(Path(plan), profile) if plan else allocate(profile, asked, margin=_MARGIN)
        clock.lap("plan")
        best = finish(job, profile, calibration, room, chosen, asked, exact=plan is None)
        rivals = [] if plan else _rivals(job, profile, calibration, room, asked, best)
        clock.lap("encode")
    # The better of the plans that were measured wins; equal ones in favour of the simpler.
    candidates = sorted([*rivals, best], key=lambda built: built.quality)
    best, uniform_one = (
        candidates[0],
        next((built for built in rivals if built.plan.label not in ("mixed", "one family")), None),
    )
    kept = None if workspace is None else Path(workspace)
    return Compressed(job, profile, calibration, asked, best, uniform_one, preset, clock.laps, workspace=kept)


def open_job(
    source: str | Path | nn.Module | Source,
    data: Any,
    objective: str | Objective | None,
    methods: Sequence[str] | None,
    preset: str,
    ignore: Iterable[str],
    keep: Mapping[str, str],
    seed: int,
    progress: Progress,
) -> Job:
    """Check a request and gather what all steps share."""
    chosen = select_methods(methods, preset)
    if not -(2**63) <= seed < 2**63:
        raise RequestError(f"seed {seed} does not fit 64 bits; choose a smaller one")
    opened = jobs.open_source(source)
    sites, left, pinned = jobs.apply_patterns(*opened.sites(), ignore, keep)
    if not sites:
        raise RequestError(
            f"{opened.path or opened.title}: there is nothing to compress, no matrix of at least {SMALLEST_SITE} "
            "weights that is not ignored"
        )
    batches, text = jobs.load_data(opened, data, limit=_TEXTS[preset])
    calibration, held = jobs.split(batches)
    if opened.module is not None and not batches:
        opened.module = None
    wanted = jobs.choose_objective(opened, objective)
    return Job(opened, sites, left, wanted, calibration, held, text, chosen, pinned, seed, progress)


def describe(job: Job, preset: str) -> dict[str, Any]:
    """What makes a job itself; finished steps of one job are never used for another."""
    return {
        "source": job.source.fingerprint(),
        "data": hash_tensors([job.calibration_data, job.held_data]),
        "objective": type(job.objective).__name__,
        "methods": [repr(method) for method in job.methods],
        "sites": [site.name for site in job.sites],
        "pinned": {name: list(choice) for name, choice in job.pinned.items()},
        "preset": preset,
        "seed": job.seed,
    }


def build_profile(job: Job, calibration: Calibration, room: Workspace, bits: float | None, preset: str) -> Profile:
    """Curves of all sites, those of finished sites from the workspace, and their correction by measured plans.

    ``bits`` per weight tells around which size points are wanted; None takes all.
    """
    spread = {"fast": (0.45, 1.9), "default": (0.25, 2.5), "best": (0.1, 4.0)}[preset]
    # Near the smallest artifact every site needs its coarsest point, wherever that lies.
    least = 0.0 if bits is None or bits < 1 else bits * spread[0]
    window = Window() if bits is None else Window(least, max(bits * spread[1], 6.0), _STRIDE[preset])
    saved = room.read_json("profile.json")
    if saved is not None and saved.get("options", {}).get("bits") in (None, bits):
        return Profile.load(room.path / "profile.json")
    curves = []
    for index, site in enumerate(job.sites):
        name = f"curves/{index:05d}{'' if bits is None else f'-{bits:.6g}'}.json"
        found = room.read_json(name)
        if found is None:
            curve = _profile_one(job, site, calibration, room, window)
            room.write_json(name, [[p.method, p.setting, p.bytes, p.loss] for p in curve.points])
        else:
            curve = Curve(site.name, site.kind, site.shape, [Point(*entry) for entry in found])
        curves.append(curve)
        job.progress("profile", index + 1, len(job.sites))
    dtype = job.kept_dtype()
    source = job.source
    profile = Profile(source.title, source.fingerprint(), source.original_bytes, source.weights, 0, curves)
    profile.options = {"bits": bits, "preset": preset, "kept": dtype is not None}
    smallest = {curve.site: min(curve.points, key=lambda p: p.bytes) for curve in curves}
    packed = {name: job.encode(job.site(name), p.method, p.setting, calibration, room) for name, p in smallest.items()}
    profile.fixed_bytes = job.contents(packed, dtype).bytes - sum(item.bytes for item in packed.values())
    if job.measurable and preset != "fast":
        correct(job, profile, calibration, room, bits or 4.0)
    profile.save(room.path / "profile.json")
    return profile


def _profile_one(job: Job, site: Any, calibration: Calibration, room: Workspace, window: Window) -> Curve:
    weight, evidence = job.matrix(site), calibration.evidence[site.name]
    if site.name in job.pinned:
        name, setting = job.pinned[site.name]
        packed = job.encode(site, name, setting, calibration, room)
        return Curve(site.name, site.kind, site.shape, [Point(name, setting, packed.bytes, 0.0)])

    def keep(method: Any, setting: Any, packed: Packed) -> None:
        room.save_packed(site.name, method.name, setting, packed)

    return profile_site(site, weight, evidence, job.methods, window, keep)


def correct(job: Job, profile: Profile, calibration: Calibration, room: Workspace, bits: float) -> None:
    """Measure what expected losses are worth: compress one group of sites at a time, at two sizes, and look.

    The measured loss of a group is fitted as ``factor * expected ** exponent`` through the two points. Groups whose
    loss is too small to matter keep the expectation.
    """
    groups: dict[str, list[Curve]] = {}
    for curve in profile.curves:
        groups.setdefault(curve.group, []).append(curve)
    plans = []
    for share in (1.0, 0.6):
        size = max(int(profile.weights * bits * share / 8), profile.smallest)
        plans.append(allocate(profile, Budget(size, "correction")))
    total = max(plan.expected for plan in plans)
    for done, (name, curves) in enumerate(groups.items()):
        pairs = []
        for plan in plans:
            nearest = {curve.site: _nearest(curve, plan.points[curve.site]) for curve in curves}
            expected = sum(point.loss for point in nearest.values())
            if expected < 1e-3 * total:
                continue
            packed = {
                site: job.encode(job.site(site), point.method, point.setting, calibration, room)
                for site, point in nearest.items()
            }
            pairs.append((expected, float(job.measure(job.weights(packed)).mean())))
        profile.correction[name] = fit_power(pairs)
        job.progress("correct", done + 1, len(groups))


def _nearest(curve: Curve, wanted: Point) -> Point:
    """The measured point of a curve that is closest to one that may be estimated."""
    same = [point for point in curve.points if point.method == wanted.method]
    return min(same, key=lambda point: abs(math.log((point.bytes + 1) / (wanted.bytes + 1))))


def fit_power(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Factor and exponent of ``measured = factor * expected ** exponent`` through up to two (expected, measured) pairs."""
    usable = [(expected, measured) for expected, measured in pairs if expected > 0 and measured > 0]
    if not usable:
        return 1.0, 1.0
    (x1, y1), (x2, y2) = (np.log(usable[0]), np.log(usable[-1]))
    # An exponent far from 1 is noise of a small sample; it would run away outside the measured range.
    exponent = float(np.clip((y2 - y1) / (x2 - x1), 0.8, 1.25)) if abs(x2 - x1) > 0.1 else 1.0
    return float(np.exp((y1 + y2) / 2 - exponent * (x1 + x2) / 2)), exponent


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
    dtype = _kept(profile)
    points, packed = dict(plan.points), dict[str, Packed]()
    changed = list(points)
    kept_bytes = profile.fixed_bytes
    for attempt in range(_ROUNDS):
        for done, name in enumerate(changed):
            point = points[name]
            packed[name] = job.encode(job.site(name), point.method, point.setting, calibration, room)
            if point.estimated or not exact:
                points[name] = Point(point.method, point.setting, packed[name].bytes, point.loss)
            job.progress("encode", done + 1, len(changed))
        contents = job.contents(packed, dtype)
        total = contents.bytes
        kept_bytes = total - sum(item.bytes for item in packed.values())
        if not exact or _fits(total, asked):
            break
        moved = _move(profile, points, int(asked.bytes * (1 - _MARGIN / 2)) - total, attempt)
        if not moved:
            break
        points.update(moved)
        changed = list(moved)
    if total > asked.bytes and exact:
        fallback = allocate(profile, asked, margin=2 * _MARGIN, interpolate=False)
        points = dict(fallback.points)
        packed = {n: job.encode(job.site(n), p.method, p.setting, calibration, room) for n, p in points.items()}
        contents = job.contents(packed, dtype)
        total = contents.bytes
        if total > asked.bytes:
            raise unreachable(asked, profile.original_bytes, total)
    stored = {name: tensor.to(old) for name, (tensor, old) in contents.kept.items()}
    losses = job.measure({**job.weights(packed), **stored}).numpy() if job.measurable else None
    expected = sum(profile.corrected(curve, points[curve.site].loss) for curve in profile.curves)
    done_plan = Plan(plan.budget, points, expected, kept_bytes, plan.label, plan.notes)
    if not exact and total > asked.bytes:
        raise RequestError(
            f"the plan takes {total} bytes, its budget is {asked.bytes}; choose coarser settings for some sites"
        )
    if losses is None:
        return Built(done_plan, packed, contents, total, expected)
    return Built(done_plan, packed, contents, total, float(losses.mean()), float(np.quantile(losses, 0.95)))


def _kept(profile: Profile) -> torch.dtype | None:
    return torch.float16 if profile.options.get("kept") else None


def _fits(total: int, asked: Budget) -> bool:
    return asked.bytes * (1 - 2.5 * _MARGIN) <= total <= asked.bytes


def _move(profile: Profile, points: Mapping[str, Point], missing: int, attempt: int) -> dict[str, Point]:
    """New points of continuous settings that change the bytes by about ``missing``.

    A small gap is closed at the largest such site alone, so that little has to be encoded again; a large one by moving
    all of them together, which keeps them at one slope.
    """
    elastic = {name: point for name, point in points.items() if get_method(point.method).elastic}
    if not elastic:
        return {}
    largest = max(elastic, key=lambda name: elastic[name].bytes)
    moving = {largest: elastic[largest]} if abs(missing) < 0.04 * elastic[largest].bytes else elastic
    if attempt % 4 == 3:
        moving = elastic
    sizes = {curve.site: math.prod(curve.shape) for curve in profile.curves}
    weights = sum(sizes[name] for name in moving)
    # At one bit less per weight the step doubles; at low rates a bit is worth more steps, hence the second factor.
    rate = sum(point.bytes for point in moving.values()) * 8 / weights
    octaves = -missing * 8 / weights * max(1.0, 1.6 / max(rate, 0.1))
    octaves = float(np.clip(octaves, -2, 2))
    moved = {}
    for name, point in moving.items():
        method = get_method(point.method)
        setting = method.at(point.setting, method.octaves(point.setting) + octaves)
        if setting != point.setting:
            moved[name] = Point(point.method, setting, point.bytes, point.loss * 4**octaves, estimated=True)
    return moved


def _rivals(
    job: Job, profile: Profile, calibration: Calibration, room: Workspace, asked: Budget, best: Built
) -> list[Built]:
    """What the mixed plan must beat: the best uniform plan at the same bytes, and the best plan of a single family."""
    plans = uniform(profile, Budget(int(asked.bytes * (1 - _MARGIN)), asked.asked))[:1]
    plans += single_families(profile, asked)[:1]
    built: list[Built] = []
    for plan in plans:
        if any(_same(plan, other.plan) for other in (best, *built)):
            continue
        try:
            built.append(finish(job, profile, calibration, room, plan, asked))
        except OctavoError as error:
            job.notes.append(f"the {plan.label} plan could not be built for comparison: {error}")
    return built


def _same(one: Plan, other: Plan) -> bool:
    """Whether two plans differ by no more than the finishing of their continuous settings."""
    if {name: point.method for name, point in one.points.items()} != {n: p.method for n, p in other.points.items()}:
        return False
    return all(
        abs(math.log((point.bytes + 1) / (other.points[name].bytes + 1))) < _MARGIN
        for name, point in one.points.items()
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
            plan = allocate(profile, asked, margin=_MARGIN, methods=[*names, "keep"])
        except BudgetError:
            continue
        plan.label, plan.notes = "one family", [family]
        plans.append(plan)
    return sorted(plans, key=lambda plan: plan.expected)


def refuse_unreachable(job: Job, asked: Budget) -> None:
    """Refuse a hopeless budget before any work is done, naming what can be reached.

    What can be reached is found by encoding every site at its coarsest setting, without data: a second's work, and only
    done when so few bits are asked for that it may matter. What is close to the limit goes through, and is decided when
    the profile is known.
    """
    shapes = job.source.shapes
    beside = _ENTRY * len(shapes) + sum(2 * math.prod(shapes[name]) for name in job.left)
    if (asked.bytes - beside) * 8 > _SUSPICIOUS * job.source.weights:
        return
    evidence = data_free(job.source, job.sites).evidence
    packed = {site.name: _coarsest(job, site, evidence[site.name]) for site in job.sites}
    if asked.bytes > _SURE * job.contents(packed, torch.float16).bytes:
        return
    if job.measurable:
        # With data, steps differ by row and column, up to a byte each, and what is no site may not bear 16 bits.
        steps = sum(site.rows + site.columns for site in job.sites)
        smallest = int(1.1 * (job.contents(packed, None).bytes + steps))
    else:
        smallest = job.contents(packed, job.kept_dtype()).bytes
    raise unreachable(asked, job.source.original_bytes, smallest)


def _coarsest(job: Job, site: Site, evidence: Evidence) -> Packed:
    """About the smallest form of a site: what was pinned, or the coarsest setting of the methods that may be used."""
    weight = job.matrix(site)
    if site.name in job.pinned:
        name, setting = job.pinned[site.name]
        return pack(get_method(name).encode(weight, setting, evidence))
    methods = [method for method in job.methods if method.elastic] or job.methods
    coarsest = (method.encode(weight, method.settings(weight, evidence)[-1], evidence) for method in methods)
    return min(map(pack, coarsest), key=lambda packed: packed.bytes)


def _budget(job: Job, plan: str | Path | None, ratio: float | None, size: Any, bits: float | None) -> Budget:
    if plan is not None:
        if (ratio, size, bits) != (None, None, None):
            raise RequestError("a plan has its own budget: leave out ratio, size and bits")
        import yaml

        try:
            data = yaml.safe_load(Path(plan).read_text(encoding="utf-8"))
            return Budget(int(data["budget"]), str(data["asked"]))
        except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
            raise RequestError(f"{plan}: not a plan: {error}") from error
    return budget_of(job.source.original_bytes, job.source.weights, ratio=ratio, size=size, bits=bits)


class _Clock:
    """Seconds by step."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now
