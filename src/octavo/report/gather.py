"""Gathering the report, measured on the artifact read back from disk."""

from __future__ import annotations

import math
import os
import platform
import resource
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from octavo.allocation.budget import Budget
from octavo.allocation.interpolation import densified
from octavo.allocation.leftover import upgrades
from octavo.allocation.plans import Plan
from octavo.allocation.profiles import Profile
from octavo.allocation.solver import PointTable, uniform
from octavo.artifact import Artifact, dtype_name
from octavo.calibration.inmemory import replaced
from octavo.calibration.objective import OfOutputs
from octavo.encoding.result import Result
from octavo.encoding.section import Section
from octavo.errors import BudgetError
from octavo.integrations.transformers import load_as_users_do
from octavo.methods import get_method
from octavo.report.schema import (
    Allowed,
    BestUniform,
    BitsHistogram,
    Calibrated,
    ChosenPoint,
    CurvePoint,
    Environment,
    FamilyTotal,
    KeptRow,
    Latency,
    Original,
    Report,
    SiteRow,
    Tradeoff,
    UniformPoint,
    UnusedFamily,
    WrittenArtifact,
)
from octavo.report.stop_plans import explorer_of
from octavo.report.text import things
from octavo.request import Request
from octavo.runtimes.packed.speed import interleaved
from octavo.sources.batches import run, sequences_in
from octavo.sources.differences import Difference
from octavo.sources.sentences import transformer_folder
from octavo.system.raw import Lazily
from octavo.system.version import __version__
from octavo.verification.proof import Proof
from octavo.verification.recorded import Digests, Quality
from octavo.verification.verifying import digest_of

_PAIRS = 7
#: Seconds after which no further round is timed, by preset.
_PATIENCE = {"fast": 0.4}
_USUAL_PATIENCE = 2.0


def report_data(
    done: Result,
    artifact: Artifact,
    files: Mapping[str, int],
    proof: Proof,
    plans: Callable[[Profile, Sequence[Request]], Sequence[Plan]],
    section: Section | None = None,
    command: str = "",
) -> Report:
    """The report; quality is that of the model loaded from the artifact.

    Parameters
    ----------
    files
        Bytes of the files written, by relative path: those of the artifact, or those of another runtime.
    plans
        Solves a profile for several budgets, as the target does for ``octavo plan``.
    """
    opened, profile, built = done.opened, done.profile, done.built
    losses, outputs = proof.losses, proof.outputs
    quality = None if losses is None else float(losses.mean())
    p95 = None if losses is None else float(losses.quantile(0.95))
    written = sum(files.values())
    sites = tuple(_site_row(done, name) for name in built.packed)
    codecs: dict[str, int] = {}
    for entry in built.contents.entries.values():
        for codec, size in entry.packed.codecs.items():
            codecs[codec] = codecs.get(codec, 0) + size
    return Report(
        title=profile.title,
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        octavo_version=__version__,
        command=command or _call(done.budget),
        environment=environment(),
        seed=opened.request.seed,
        preset=opened.request.preset,
        source=Original(
            # Only the folder's name: cards are published, and a full path would reveal details of the machine.
            path=opened.source.path.name if opened.source.path else opened.source.title,
            fingerprint=profile.fingerprint,
            bytes=profile.original_bytes,
            parameters=profile.weights,
            dtypes=_dtypes(done),
            stored=opened.source.stored,
            dense_bytes=opened.source.original.dense_bytes,
            base=opened.source.base.source.title if isinstance(opened.source, Difference) else None,
        ),
        budget=Allowed(done.budget.asked, done.budget.bytes, done.budget.target),
        artifact=WrittenArtifact(
            bytes=written,
            ratio=profile.original_bytes / written,
            used=built.counted / done.budget.bytes,
            files=dict(files),
            bits_per_weight=written * 8 / profile.weights,
            note="" if built.counted >= done.budget.least else _why_less(done),
        ),
        quality=Quality(
            metric=opened.objective.metric,
            loader=proof.loader,
            why=proof.why,
            data=f"{sum(map(sequences_in, opened.held_data))} held-out examples of {opened.text}"
            if opened.measurable
            else opened.text,
            value=quality,
            uniform=done.rival.quality if done.rival and losses is not None else None,
            p95=p95,
        ),
        latency=_latency(done, artifact),
        calibration=Calibrated(
            done.run.calibration.text,
            done.run.calibration.sequences,
            done.run.calibration.tokens,
            (*opened.notes, *done.run.calibration.warnings),
        ),
        winner="uniform" if done.rival is not None and built.plan.is_uniform else "mixed",
        uniform=_best_uniform(done),
        curve=tradeoff(done, quality),
        sites=sites,
        kept=(
            *(_kept_row(done, name, reason) for name, reason in opened.left.items() if name in built.contents.kept),
            *_form_rows(done),
        ),
        families=_families(sites),
        unused=unused(done),
        code_lengths=_code_lengths(sites),
        coding=codecs,
        digests=Digests(
            weights=digest_of(artifact, partial(done.run.progress, "verify")),
            # A model whose outputs are not finite is not known again by them.
            outputs=outputs if outputs is not None and math.isfinite(outputs.scale) else None,
        ),
        peak_memory=peak_memory(),
        explorer=explorer_of(done, plans, command, _call(done.budget)),
        sections=tuple(own.section() for own in (done.cut, done.recovery) if own) + ((section,) if section else ()),
    )


def _call(budget: Budget) -> str:
    asked, target = budget.asked.removesuffix(budget.unit.removeprefix("bytes")).replace(" ", "="), ""
    if budget.target != "disk":
        target = f', target="{budget.target}"'
    return f"octavo.compress(source, {asked}{target}).save(path)"


def _why_less(done: Result) -> str:
    plan, pinned = done.built.plan, done.opened.pinned
    if done.cut is not None and not plan.points:
        return "less than 98% of the budget is used: with one more unit at every place it would be exceeded"
    if not any(point.loss for point in plan.points.values()) and not pinned:
        return "less than the budget is used: the source is restored bit for bit, so more bytes cannot lower the loss"
    less = "less than 98% of the budget is used"
    if done.built.refused:
        return (
            f"{less}: finer settings of {things(done.built.refused, 'site')} would fit, but did not lower the measured "
            "loss"
        )
    if upgrades(done.profile, plan.points, done.budget.bytes - done.built.counted, pinned):
        return f"{less} by this plan"
    known = "the settings with a kernel" if done.budget.target == "memory" else "the settings that were tried"
    return f"{less}: none of {known} that fit the remaining bytes lowers a site's expected loss"


def environment() -> Environment:
    """Versions and machine, without names of persons or paths."""
    return Environment(
        python=platform.python_version(),
        torch=torch.__version__,
        cpu_count=os.cpu_count(),
        threads=torch.get_num_threads(),
        platform=f"{platform.system()} {platform.machine()}",
    )


def peak_memory() -> int:
    """Largest resident size of this process so far, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _dtypes(done: Result) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, dtype in done.opened.source.dtypes.items():
        elements = math.prod(done.opened.source.original.shapes[name])
        counts[dtype_name(dtype)] = counts.get(dtype_name(dtype), 0) + elements
    return counts


def _site_row(done: Result, name: str) -> SiteRow:
    site, point, packed = done.opened.site(name), done.built.plan.points[name], done.built.packed[name]
    curve = next(curve for curve in done.profile.curves if curve.site == name)
    target = done.opened.target
    # In another runtime's file a site takes what the budget counts; in an artifact it takes its own bytes.
    size = target.bytes(packed) if target.foreign else packed.bytes
    return SiteRow(
        name=name,
        kind=site.kind,
        shape=tuple(site.shape),
        parameters=site.parameters,
        method=point.method,
        family=get_method(point.method).family,
        setting=point.setting,
        bytes=size,
        original_bytes=site.parameters * site.dtype.itemsize,
        bits_per_weight=size * 8 / site.parameters,
        expected_loss=done.profile.corrected(curve, point.loss),
        form=packed.meta["form"],
        tied=tuple(site.tied),
    )


def _families(sites: Sequence[SiteRow]) -> dict[str, FamilyTotal]:
    won: dict[str, list[SiteRow]] = {}
    for row in sites:
        won.setdefault(row.family, []).append(row)
    return {
        family: FamilyTotal(len(rows), sum(row.bytes for row in rows), sum(row.expected_loss or 0.0 for row in rows))
        for family, rows in won.items()
    }


def _kept_row(done: Result, name: str, reason: str) -> KeptRow:
    kept = done.built.contents.kept[name]
    elements = math.prod(kept.shape)
    narrow = f": stored as {dtype_name(kept.stored)}" if kept.stored != kept.dtype else ": stored unchanged"
    if kept.coded and name in done.opened.source.folded:
        narrow = ": all elements are equal, stored once"
    return KeptRow(
        name=name,
        shape=tuple(kept.shape),
        bytes=kept.measured[0],
        original_bytes=elements * kept.dtype.itemsize,
        reason=reason if reason.startswith("not a floating") else reason + narrow,
    )


def _form_rows(done: Result) -> Iterator[KeptRow]:
    """What weights that are forms take beside those parts of them that are sites."""
    for name, entry in done.built.contents.entries.items():
        parts = [packed.bytes for part, packed in done.built.packed.items() if part.startswith(f"{name}/")]
        rest = entry.packed.bytes - sum(parts)
        if name not in done.built.packed and rest:
            reason = f"{'the rest of ' if parts else ''}a form: stored as it was trained"
            yield KeptRow(name, entry.shape, rest, math.prod(entry.shape) * entry.dtype.itemsize, reason)


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


def _best_uniform(done: Result) -> BestUniform | None:
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


def _code_lengths(sites: Sequence[SiteRow]) -> BitsHistogram:
    top = max([1.0, *(row.bits_per_weight for row in sites)])
    step = 0.25 if top <= 8 else 0.5 if top <= 16 else 1.0
    bins = tuple(step * k for k in range(int(top / step) + 2))
    weights = [0.0] * (len(bins) - 1)
    for row in sites:
        weights[min(int(row.bits_per_weight / step), len(weights) - 1)] += row.parameters
    return BitsHistogram(bins, tuple(weights))


def _latency(done: Result, artifact: Artifact) -> Latency | None:
    """Latency of a forward pass before and after, interleaved in one run so that the machine's load cancels."""
    opened = done.opened
    if opened.source.module is None or opened.source.is_skeleton or not opened.held_data:
        return None
    module, batch = opened.source.module, opened.held_data[0]
    original = opened.source.original.module or module
    weights = opened.source.placed(Lazily({name: partial(artifact.stored, name) for name in artifact.names()}))

    # A user's objective may use parts of a batch that the module does not take.
    call_on = run if isinstance(opened.objective, OfOutputs) else opened.objective.outputs

    def pass_of(module: nn.Module, tensors: Mapping[str, Tensor]) -> Callable[[], Any]:
        def call() -> None:
            with replaced(module, tensors):
                call_on(module, batch)

        return call

    both = {"original": pass_of(original, {}), "artifact": pass_of(module, weights)}
    patience = _PATIENCE.get(opened.request.preset, _USUAL_PATIENCE)
    seconds = interleaved(both, _PAIRS, patience)
    result = Latency(
        original=1000 * seconds["original"],
        artifact=1000 * seconds["artifact"],
        note="median of interleaved passes of one batch; weights are decoded at load, both run dense",
    )
    if opened.source.is_transformers and opened.source.path is not None and opened.source.path.is_dir():
        source, written = (transformer_folder(path) for path in (opened.source.path, artifact.path))
        # Reading the original must touch its pages too, since a mapped file is only loaded when read.
        loads = {
            "load_original": lambda: _touch(load_as_users_do(source).model),
            "load_artifact": lambda: _touch(load_as_users_do(written).model),
        }
        seconds = interleaved(loads, 3, patience)
        result = replace(
            result,
            load_original=1000 * seconds["load_original"],
            load_artifact=1000 * seconds["load_artifact"],
        )
    return result


def _touch(module: nn.Module) -> float:
    return float(sum(parameter.detach().sum() for parameter in module.parameters()))
