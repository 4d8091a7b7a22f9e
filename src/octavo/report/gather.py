"""Gathering the report, measured on the artifact read back from disk."""

from __future__ import annotations

import math
import os
import platform
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial

import torch

from octavo.allocation.budget import Budget
from octavo.allocation.leftover import upgrades
from octavo.allocation.plans import Plan
from octavo.allocation.profiles import Curve, Profile
from octavo.artifact import Artifact, dtype_name
from octavo.encoding.result import Result
from octavo.encoding.section import Section
from octavo.methods import get_method
from octavo.report.alternatives import best_uniform, tradeoff, unused
from octavo.report.latency import latency_of
from octavo.report.schema import (
    Allowed,
    BitsHistogram,
    Calibrated,
    Environment,
    FamilyTotal,
    KeptRow,
    Original,
    Report,
    SiteRow,
    WrittenArtifact,
)
from octavo.report.stop_plans import explorer_of
from octavo.report.text import things
from octavo.request import Request
from octavo.sources.batches import sequences_in
from octavo.sources.differences import Difference
from octavo.system.version import __version__
from octavo.verification.proof import Proof
from octavo.verification.recorded import Digests, Quality
from octavo.verification.verifying import digest_of


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
    sites = tuple(_site_row(done, curve) for curve in profile.curves if curve.site in built.packed)
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
        budget=Allowed(done.budget.asked, done.budget.bytes, done.budget.target, done.budget.unit),
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
            # No call loads the artifact that was measured where only another runtime's files are kept.
            loader="" if opened.target.foreign else proof.loader,
            became=" and ".join(files) if opened.target.foreign else "",
            why=proof.why,
            data=f"{sum(map(sequences_in, opened.held_data))} held-out examples of {opened.text}"
            if opened.measurable
            else opened.text,
            value=quality,
            uniform=done.rival.quality if done.rival and losses is not None else None,
            p95=p95,
        ),
        latency=latency_of(done, artifact),
        calibration=Calibrated(
            done.run.calibration.text,
            done.run.calibration.sequences,
            done.run.calibration.tokens,
            (*opened.notes, *done.run.calibration.warnings),
        ),
        winner="uniform" if done.rival is not None and built.plan.is_uniform else "mixed",
        uniform=best_uniform(done),
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
    words = budget.asked.removesuffix(budget.unit.removeprefix("bytes"))
    rate = words.removesuffix(" bits per weight")
    name, _, value = words.partition(" ") if rate == words else ("bits", " ", rate)
    given = value if name in ("ratio", "bits", "speedup") else f'"{value}"'
    target = "" if budget.target == "disk" else f', target="{budget.target}"'
    return f"octavo.compress(source, {name}={given}{target}).save(path)"


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


def _site_row(done: Result, curve: Curve) -> SiteRow:
    name = curve.site
    site, point, packed = done.opened.site(name), done.built.plan.points[name], done.built.packed[name]
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


def _code_lengths(sites: Sequence[SiteRow]) -> BitsHistogram:
    top = max([1.0, *(row.bits_per_weight for row in sites)])
    step = 0.25 if top <= 8 else 0.5 if top <= 16 else 1.0
    bins = tuple(step * k for k in range(int(top / step) + 2))
    weights = [0.0] * (len(bins) - 1)
    for row in sites:
        weights[min(int(row.bits_per_weight / step), len(weights) - 1)] += row.parameters
    return BitsHistogram(bins, tuple(weights))
