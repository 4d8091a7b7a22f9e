"""A request: checked, opened, and refused at once where it cannot be served."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn

from octavo.allocation.budget import TARGETS, Budget, parse_size
from octavo.allocation.budget import budget as budget_of
from octavo.allocation.patterns import apply_patterns
from octavo.allocation.plans import EDITED, Plan, read_plan
from octavo.allocation.sampling import sample_of
from octavo.allocation.solver import labelled, unreachable
from octavo.artifact import Packed, pack
from octavo.calibration import folds, inputs
from octavo.calibration.calibrating import CURVATURES, data_free
from octavo.calibration.evidence import Evidence
from octavo.calibration.objective import Objective
from octavo.calibration.objective import objective as objective_of
from octavo.calibration.witness import Witness
from octavo.calibration.workspace import Workspace, files_of, hash_tensors
from octavo.encoding.job import Job
from octavo.errors import OctavoError, RequestError
from octavo.forms import Dense
from octavo.methods import DATA_FREE, get_method, select_methods
from octavo.request import check_kinds
from octavo.runtimes.packed import resident_bytes
from octavo.sources.batches import Batch
from octavo.sources.memory import fits, least_bytes
from octavo.sources.narrowing import Narrowing
from octavo.sources.sites import SMALLEST_SITE, Site, Source
from octavo.system.paths import checked
from octavo.system.progress import Progress

#: Texts read at most, and settings skipped, by preset.
_TEXTS = {"fast": 128, "default": 384, "best": None, DATA_FREE: None}
#: Budgets of fewer bits per weight are checked for being reachable before anything else.
_SUSPICIOUS = 0.6
#: Bytes of a tensor's entries in manifest and header, roughly.
_ENTRY = 256
#: Rows of a site that tell what it takes in memory: as many as the int4 kernel packs together.
_ROWS = 64
#: Below this share of the smallest artifact found without data, a budget is refused at once.
_SURE = 0.9


def _watched(opening: Callable[..., Job]) -> Callable[..., Job]:
    """Files of a source are looked at before any of them is read, and blamed if they were changed meanwhile.

    It adds ``work``: the folder of kept work from which a run goes on, with what it was made from.
    """

    @wraps(opening)
    def opened(source: Any, data: Any, *args: Any, work: Path | None = None, **options: Any) -> Job:
        witness = Witness(*_paths(source, data))
        try:
            with witness.blamed():
                return opening(source, data, *args, witness=witness, **options)
        except OctavoError as error:
            gone = work is None or witness.source is None or not witness.source.exists()
            changed = [] if work is None or gone else witness.changed(files_of(work) or witness.digests)
            if not changed:
                raise
            raise RequestError(
                f"{work}: holds work on files that were changed since then: {', '.join(changed)}; put them back, or "
                f"run without --resume to begin anew ({error})"
            ) from error

    return opened


@_watched
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
    memory: str | int | None = None,
    target: str = "disk",
    curvature: str = "kfac",
    forward_args: Callable[[Batch], Any] | None = None,
    *,
    folding: bool = True,
    witness: Witness | None = None,
) -> Job:
    """Check a request and gather what all steps share.

    ``folding`` says whether batch normalisation may be folded, which whoever runs the module's own graph must not do.
    """
    if curvature not in CURVATURES:
        raise RequestError(f"curvature {curvature!r} is not known; choose from {', '.join(CURVATURES)}")
    if target not in TARGETS:
        raise RequestError(
            f"target {target!r} is none that sizes are measured for; choose from {', '.join(TARGETS)}. For speed, run "
            "octavo compress --for speed (octavo.compress(target='speed'))"
        )
    check_kinds(methods, ignore, keep, seed)
    if objective is not None:
        objective = objective_of(objective)
    limit = None if memory is None else parse_size(memory)
    chosen = select_methods(methods, preset, target)
    # Without data nothing is run, and the model need not fit in memory.
    in_memory = target == "memory"
    opened = inputs.open_source(source, module=in_memory or preset != DATA_FREE, progress=progress)
    _check_memory(opened, limit)
    sites, left = opened.sites()
    if in_memory:
        sites, left = _unfused(opened, sites, left)
        opened.unstored = _unstored(opened)
    sites, left, pinned = apply_patterns(sites, left, ignore, keep)
    if not sites:
        raise RequestError(
            f"{opened.path or opened.title}: there is nothing to compress, no matrix of at least {SMALLEST_SITE} "
            "weights that is not ignored"
        )
    module = opened.module
    if preset == DATA_FREE:
        opened.module = None
    batches, text = inputs.load_data(opened, data, limit=_TEXTS[preset], forward_args=forward_args)
    if objective is not None and not batches:
        raise RequestError(
            f"{opened.path or opened.title}: objective says how outputs are compared, and nothing is run here (data: "
            f"{text}); give data that a model of it takes, or leave objective out"
        )
    wanted = inputs.choose_objective(opened, objective, batches)
    if opened.module is not None and not batches:
        opened.module = None
    if opened.module is None and curvature != "kfac":
        raise RequestError(
            f"{opened.path or opened.title}: curvature {curvature!r} is measured, which needs a model that runs and "
            "data for it; give both, or leave curvature at 'kfac'"
        )
    if opened.module is not None:
        batches = inputs.prepared(opened, wanted, batches)
    rows = inputs.divisible(opened, wanted, batches)
    calibration, held = inputs.split(batches, rows=rows)
    if folding and not all(method.lossless for method in chosen):
        opened = _folded(opened, module, calibration, wanted, left, limit)
    return Job(
        opened, sites, left, wanted, calibration, held, text, chosen, pinned, seed, progress, target,
        [*opened.notes, *inputs.notes_on(opened, wanted, batches)], limit, curvature=curvature,
        witness=witness or Witness(None),
    )  # fmt: skip


def _check_memory(source: Source, limit: int | None) -> None:
    """Refuse a limit of memory that no run keeps to, and one for a source that has no way to go with less."""
    if limit is None:
        return
    if not source.is_transformers or not (source.module is None or source.is_skeleton):
        raise RequestError(
            f"{source.path or source.title}: memory says whether a model is run block by block, which needs the folder "
            "of a transformers model; leave memory out"
        )
    least = least_bytes(source)
    if limit < least:
        raise RequestError(
            f"memory is {limit:,} bytes, and a run on this source takes {least:,} at least, block by block; give more"
        )


def _paths(source: Any, data: Any) -> tuple[Path | None, Any]:
    """The paths that a source and data were given as, or None where they are in memory."""
    path = source.path if isinstance(source, Source) else source if isinstance(source, str | Path) else None
    return (None if path is None else checked(path)), checked(data) if isinstance(data, str | Path) else data


def _unfused(source: Source, sites: list[Site], left: dict[str, str]) -> tuple[list[Site], dict[str, str]]:
    """Sites that can run packed: the loader makes other tensors of the rest, such as one of all experts of a layer."""
    fused = {source.aliases.get(name, name) for item in source.conversions for name in item.names}
    reason = "made a part of another tensor at load, which no kernel runs packed"
    return (
        [site for site in sites if site.name not in fused],
        {**left, **{site.name: reason for site in sites if site.name in fused}},
    )


def _unstored(source: Source) -> int:
    if source.module is None:
        return 0
    stored = set(source.parameters.values())
    return sum(buffer.nbytes for name, buffer in source.module.named_buffers() if name not in stored)


def _folded(
    source: Source,
    module: nn.Module | None,
    calibration: Sequence[Batch],
    objective: Objective,
    left: Mapping[str, str],
    memory: int | None,
) -> Source:
    """The source with batch normalisation folded into the layers before it, where that can be."""
    if module is None or not folds.has_norms(module):
        return source
    if source.is_skeleton and calibration:
        if not fits(source, memory):
            return source
        inputs.model_of(source, blockwise=False)
        module = source.module
    ignored = [name for name, reason in left.items() if reason.startswith("ignored")]
    return folds.fold(source, module, calibration[0] if calibration else None, objective, ignored)


def describe(job: Job, preset: str) -> dict[str, Any]:
    """What makes a job itself; finished steps of one job are never used for another."""
    return {
        "source": job.source.fingerprint(),
        "data": hash_tensors([job.calibration_data, job.held_data]),
        "objective": type(job.objective).__name__,
        "methods": [repr(method) for method in job.methods],
        "sites": [site.name for site in job.sites],
        "folded": sorted(job.source.folded),
        "pinned": {name: list(choice) for name, choice in job.pinned.items()},
        "preset": preset,
        "seed": job.seed,
        "target": job.target,
        "curvature": job.curvature,
        "files": job.witness.digests,
    }


def workspace_of(job: Job, folder: Path, preset: str, *, resume: bool, **other: Any) -> Workspace:
    """The folder of a job's unfinished work; ``other`` is what else makes it another job."""
    room = Workspace(folder, {**describe(job, preset), **other}, resume=resume, witness=job.witness)
    # One list, so that what is found to be damaged on the way is told with all other notes.
    job.damaged = room.damaged
    return room


def requested_budget(job: Job, ratio: float | None, size: Any, bits: float | None) -> Budget:
    """The budget from exactly one of ratio, size and bits."""
    source = job.source
    return budget_of(source.original_bytes, source.weights, ratio=ratio, size=size, bits=bits, target=job.target)


def requested_plan(job: Job, file: Path, *sizes: Any) -> Plan:
    """The plan of a file, if it can be that of a job, and no size is given beside it.

    Raises
    ------
    RequestError
        If it is for other sites or another target, or has another form of a site than the user asks for now.
    """
    if any(size is not None for size in sizes):
        raise RequestError("a plan has its own budget: leave out ratio, size and bits")
    plan, source = read_plan(file, [site.name for site in job.sites]), job.source
    budget = plan.budget
    if budget.target != job.target:
        raise RequestError(f"{file}: counts the bytes of {budget.target}, not of {job.target}; ask for the same target")
    for name, (method, setting) in job.pinned.items():
        point = plan.points[name]
        if (point.method, point.setting) != (method, setting):
            raise RequestError(
                f"{file}: site {name!r} has {labelled(point.method, point.setting)}, and --keep asks for "
                f"{labelled(method, setting)}; change one of them"
            )
    same = not plan.fingerprint or plan.fingerprint == source.fingerprint()
    if not same:
        job.notes.append("the plan was made for another source: its sizes were finished for this one")
    # In other words a budget that was edited, or that of another source, would be a ratio or a rate that it is not.
    said = same and (plan.label != EDITED or _says(budget, source))
    if said:
        return plan
    bare = budget_of(source.original_bytes, source.weights, size=budget.bytes, target=job.target)
    return replace(plan, budget=bare)


def _says(budget: Budget, source: Source) -> bool:
    """Whether a budget's words and its bytes are the same for a source."""
    words = budget.asked.removesuffix(f" in {budget.target}").replace(" bits per weight", "").split(" ", 1)
    given: dict[str, Any] = {words[0] if len(words) == 2 else "bits": words[-1]}
    try:
        meant = budget_of(source.original_bytes, source.weights, **given, target=budget.target)
    except (RequestError, TypeError):
        return False
    return meant.bytes == budget.bytes


def refuse_unreachable(job: Job, asked: Budget) -> None:
    """Refuse a hopeless budget before any work is done, naming what can be reached.

    What can be reached is found by encoding every site at its coarsest setting, without data: a second's work, and only
    done when so few bits are asked for that it may matter. What is close to the limit goes through, and is decided when
    the profile is known.
    """
    shapes = job.source.shapes
    if job.target == "memory":
        _refuse_small_memory(job, asked)
        return
    beside = _ENTRY * len(shapes) + sum(2 * math.prod(shapes[name]) for name in job.left)
    if (asked.bytes - beside) * 8 > _SUSPICIOUS * job.source.weights:
        return
    evidence = data_free(job.source, job.sites).evidence
    packed = {site.name: _coarsest(job, site, evidence[site.name]) for site in job.sites}
    if asked.bytes > _SURE * job.contents(packed, Narrowing.SCALE).bytes:
        return
    if job.measurable:
        # With data, steps differ by row and column, up to a byte each, and what is no site may not bear 16 bits.
        steps = sum(site.rows + site.columns for site in job.sites)
        smallest = int(1.15 * (job.contents(packed, Narrowing.EXACT).bytes + steps))
    else:
        smallest = job.contents(packed, job.narrowing()).bytes
    raise unreachable(asked, job.source.original_bytes, smallest)


def _refuse_small_memory(job: Job, asked: Budget) -> None:
    """Refuse a budget of memory that even the coarsest settings with a kernel exceed.

    Their sizes depend on shapes, so a few rows of every site tell them.
    """
    smallest = job.resident({})
    for site in job.sites:
        rows = job.matrix(site)[:_ROWS]
        evidence = Evidence(torch.ones(len(rows)), None)
        if site.name in job.pinned:
            name, setting = job.pinned[site.name]
            choices = [(get_method(name), setting)]
        else:
            offered = ((method, method.kernel_settings(rows, evidence)) for method in job.methods)
            choices = [(method, settings[-1]) for method, settings in offered if settings]
        forms = (method.encode(rows, setting, evidence) for method, setting in choices)
        smallest += min(resident_bytes(form, site.rows) for form in forms)
    if asked.bytes < smallest:
        raise unreachable(asked, job.source.original_bytes, smallest)


def _coarsest(job: Job, site: Site, evidence: Evidence) -> Packed:
    """About the smallest form of a site: what was pinned, or the coarsest setting of the methods that may be used."""
    weight = job.matrix(site)
    if site.name in job.pinned:
        name, setting = job.pinned[site.name]
        return pack(get_method(name).encode(weight, setting, evidence))
    methods = [method for method in job.methods if method.elastic] or job.methods
    sample, packing = sample_of(weight, evidence), pack
    if sample is not None:
        weight, evidence, packing = sample.weight, sample.evidence, sample.packed
        methods = [method for method in methods if method.by_rows] or methods
    settings = [(method, method.settings(weight, evidence)[-1:]) for method in methods]
    # A method may have nothing to offer here.
    forms = [form for method, last in settings if last for form in method.encode_all(weight, last, evidence)]
    return min(map(packing, forms or [Dense(weight.half())]), key=lambda packed: packed.bytes)
