"""Opening a request: its source and data, checked, and refused at once where they cannot be served."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from octavo.allocation.budget import parse_size
from octavo.allocation.opened import Opened, Run
from octavo.allocation.patterns import apply_patterns
from octavo.allocation.workspace import Workspace, files_of
from octavo.calibration import folds, inputs
from octavo.calibration.calibrating import Calibration, data_free
from octavo.calibration.objective import Objective
from octavo.calibration.objective import objective as objective_of
from octavo.calibration.runner import Runner
from octavo.encoding.recovering import check_teaching
from octavo.errors import OctavoError, RequestError
from octavo.methods import DATA_FREE
from octavo.request import Request
from octavo.sources.batches import Batch
from octavo.sources.differences import difference
from octavo.sources.memory import fits, least_bytes
from octavo.sources.regrouping import regrouped
from octavo.sources.source import SMALLEST_SITE, Source
from octavo.sources.witness import Witness
from octavo.system.clock import Clock
from octavo.system.executors import Executor
from octavo.system.paths import checked
from octavo.system.progress import Progress
from octavo.targets import Target

#: Texts read at most, by preset.
_TEXTS = {"fast": 96, "default": 384, "best": None, DATA_FREE: None}
_WAY = "way.json"


def open_request(
    request: Request,
    target: Target,
    progress: Progress,
    *,
    work: Path | None = None,
    folding: bool = True,
    module: bool = False,
) -> Opened:
    """Check a request and open what it names.

    Parameters
    ----------
    work
        The folder of kept work from which a run goes on, which knows the files that it was made from.
    folding
        Whether norms may be folded into the layers before them, if the target does so.
    module
        Whether the source keeps its module though there is no data to run it on: a cut changes shapes.

    Raises
    ------
    RequestError
        If something about the request, its source or its data cannot be served.
    """
    witness = Witness(*_paths(request.source, request.data))
    with _blamed(witness, work):
        return _opened(request, target, progress, witness, folding=folding, keeps=module)


def _opened(
    request: Request, target: Target, progress: Progress, witness: Witness, *, folding: bool, keeps: bool
) -> Opened:
    objective = None if request.objective is None else objective_of(request.objective)
    memory = None if request.memory is None else parse_size(request.memory)
    chosen, preset = target.methods(request), target.preset(request)
    if request.recover != "none" and request.methods is None:
        chosen = [method for method in chosen if method.learns or method.dense]
    # Without data nothing is run, and the model need not fit in memory.
    loaded = keeps or target.loads or preset != DATA_FREE
    source = inputs.open_source(request.source, module=loaded, progress=progress)
    if request.base is not None:
        source, folding = _on_base(source, request), False
    _check_memory(source, memory)
    source = target.adapted(source)
    where = source.path or source.title
    sites, left = target.admitted(source, *source.sites())
    sites, left, pinned = apply_patterns(sites, left, request.ignore, request.keep or {})
    if not sites and target.compresses:
        raise RequestError(
            f"{where}: there is nothing to compress, no matrix of at least {SMALLEST_SITE} weights that is not ignored"
        )
    module = source.module
    if preset == DATA_FREE:
        if request.data is not None:
            raise RequestError(
                f"{where}: preset {DATA_FREE!r} runs nothing, so calibration data cannot be used; leave the data out, "
                "or choose another preset"
            )
        source.module = None
    batches, text = inputs.load_data(source, request.data, limit=_TEXTS[preset], forward_args=request.forward_args)
    if objective is not None and not batches:
        raise RequestError(
            f"{where}: objective says how outputs are compared, and nothing is run here (data: {text}); give data that "
            "a model of it takes, or leave objective out"
        )
    wanted = inputs.choose_objective(source, objective, batches)
    if source.module is not None and not batches:
        source.module = None
    if source.module is None and request.curvature != "kfac":
        raise RequestError(
            f"{where}: curvature {request.curvature!r} is measured, which needs a model that runs and data for it; "
            "give both, or leave curvature at 'kfac'"
        )
    if source.module is not None:
        batches = inputs.prepared(source, wanted, batches)
    rows = inputs.divisible(source, wanted, batches)
    calibration, held = inputs.split(batches, rows=rows)
    teaching = [] if request.recover == "none" else _teaching(source, request, wanted, calibration, _TEXTS[preset])
    if rows and source.module is not None:
        calibration, held = (wanted.pieces(source.module, regrouped(part)) for part in (calibration, held))
    if folding and target.folds and not all(method.lossless for method in chosen):
        source = _folded(source, module, calibration, wanted, left, memory)
    notes = [*source.notes, *inputs.notes_on(source, wanted, batches)]
    if keeps:
        source.module = module
    opened = Opened(
        request,
        target,
        source,
        sites,
        left,
        wanted,
        calibration,
        held,
        text,
        chosen,
        pinned,
        memory,
        witness,
        notes,
        teaching,
    )
    if request.recover != "none":
        check_teaching(opened)
    target.check(opened)
    return opened


def _on_base(source: Source, request: Request) -> Source:
    """The difference of a source to its base, which no recovery is made for."""
    if request.recover != "none":
        raise RequestError(
            "base: a difference alone is stored, which recover does not teach; leave recover or base out"
        )
    return difference(source, request.base)


def _teaching(
    source: Source, request: Request, wanted: Objective, calibration: list[Batch], limit: int | None
) -> list[Batch]:
    """Batches of examples that the source teaches on: those of the calibration, and texts beyond its limit."""
    more = inputs.teaching_data(source, request.data, limit=limit)
    return [*calibration, *(inputs.prepared(source, wanted, more) if more and source.module is not None else [])]


def begin(opened: Opened, room: Workspace, executor: Executor, progress: Progress, clock: Clock | None = None) -> Run:
    """A run on an opened request: its model, and the evidence of all sites, from the workspace if it is there."""
    # The way is that of the run that is resumed, though the machine may have other memory to spare now.
    way = room.read_json(_WAY) or {"blockwise": not fits(opened.source, opened.memory)}
    room.write_json(_WAY, way)
    found, model = room.load_calibration(), None
    if opened.source.module is not None:
        model = inputs.model_of(opened.source, blockwise=way["blockwise"], scratch=room.path)
    calibration = _calibrated(opened, model, room, progress) if found is None else found
    return Run(opened, model, calibration, room, executor, progress, clock or Clock())


def _calibrated(opened: Opened, model: Runner | None, room: Workspace, progress: Progress) -> Calibration:
    """Gather the evidence of all sites, and keep it."""
    if model is None:
        found = data_free(opened.source, opened.sites)
        room.evidence.write("data-free", found.evidence)
    else:
        with opened.attending(opened.calibration_data):
            found = model.calibrate(
                opened.sites,
                opened.calibration_data,
                opened.objective,
                room,
                seed=opened.request.seed,
                text=opened.text,
                curvature=opened.request.curvature,
                # Models of transformers are trained under autocast; another module may not run there.
                coarse=opened.request.preset == "fast" and opened.source.is_transformers,
                progress=lambda done, total: progress("evidence", done, total),
            )
    room.save_calibration(found)
    # Read back when it is needed, as by a run that is resumed.
    found.evidence = room.evidence
    return found


@contextmanager
def _blamed(witness: Witness, work: Path | None) -> Iterator[None]:
    """Files of a source are looked at before any of them is read, and blamed if they were changed meanwhile."""
    try:
        with witness.blamed():
            yield
    except OctavoError as error:
        gone = work is None or witness.source is None or not witness.source.exists()
        changed = [] if work is None or gone else witness.changed(files_of(work) or witness.digests)
        if not changed:
            raise
        raise RequestError(
            f"{work}: holds work on files that were changed since then: {', '.join(changed)}; put them back, or "
            f"run without --resume to start over ({error})"
        ) from error


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
            f"{source.path or source.title}: a run needs at least {least:,} bytes of memory, block by block, and "
            f"memory is {limit:,}; give more"
        )


def _paths(source: Any, data: Any) -> tuple[Path | None, Any]:
    """The paths that a source and data were given as, or None where they are in memory."""
    path = source.path if isinstance(source, Source) else source if isinstance(source, str | Path) else None
    return (None if path is None else checked(path)), checked(data) if isinstance(data, str | Path) else data


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
