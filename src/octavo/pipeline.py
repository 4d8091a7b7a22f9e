"""The way through: source, sites, evidence, profile, plan, forms, artifact, verified."""

from __future__ import annotations

import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from octavo.allocation.budget import Budget
from octavo.allocation.curves import build_profile
from octavo.allocation.profiles import Profile
from octavo.allocation.rivals import PLAIN
from octavo.allocation.solver import allocate
from octavo.calibration.calibrating import Calibration
from octavo.calibration.objective import Objective
from octavo.calibration.workspace import forget, holds_profile
from octavo.encoding.carrying import carry_out
from octavo.encoding.disk_use import refuse_full_disk
from octavo.encoding.finish import Built, contest, margin_of
from octavo.encoding.job import Job
from octavo.encoding.reconstruct import reconstruct, reserve
from octavo.errors import RequestError
from octavo.methods import get_method
from octavo.opening import describe, open_job, refuse_unreachable, requested_budget, requested_plan, workspace_of
from octavo.report.schema import Report
from octavo.request import SPEED, check_target, named
from octavo.sources.batches import Batch
from octavo.sources.sites import Source
from octavo.system import executors
from octavo.system.executors import Executor
from octavo.system.locks import Lock
from octavo.system.matmul import fast_matmul
from octavo.system.notes import Note, by_kind, warn
from octavo.system.paths import checked_output
from octavo.system.progress import Shown, callback, showing, with_progress

#: Frames between :func:`compress` and its caller, its own and those of its decorators.
_DEPTH = 4
_USUAL = {"curvature": "kfac", "preset": "default"}


@dataclass
class Compressed:
    """A finished compression, to be saved.

    Parameters
    ----------
    built
        The best of the plans that were measured.
    rival
        The best uniform plan at the same bytes; the same object as ``built`` if it won.
    workspace
        The folder of unfinished work, where the encoded forms lie until they are saved.
    """

    job: Job
    profile: Profile
    calibration: Calibration
    budget: Budget
    built: Built
    rival: Built | None
    preset: str
    timings: dict[str, float]
    workspace: Path
    command: str = ""
    #: Held for as long as the encoded forms are needed, in a workspace that others may use.
    lock: Lock | None = None

    def __post_init__(self) -> None:
        if self.lock is not None:
            weakref.finalize(self, self.lock.release)

    @property
    def ratio(self) -> float:
        """Original bytes over what the budget counts: artifact bytes, or bytes in memory."""
        return self.job.source.original_bytes / self.built.counted

    @property
    def notes(self) -> list[Note]:
        """What there is to know about the run, put together by kind."""
        return by_kind(
            [*self.job.notes, *self.job.damaged, *self.calibration.warnings], [site.name for site in self.job.sites]
        )

    def save(self, path: str | Path, *, overwrite: bool = False, report: bool = True, progress: Shown = None) -> Report:
        """Write the artifact, read it back, measure it, write the report; returns the report.

        Parameters
        ----------
        path
            The folder to write.
        overwrite
            Whether a folder that is not empty is replaced.
        report
            Whether ``report.html`` and ``report.json`` are written beside the artifact, which loads without them.
            Without them :func:`octavo.verification.verifying` checks checksums and says of the rest that it was not
            recorded.
        progress
            As for :func:`compress`; what was chosen there by default.

        Raises
        ------
        RequestError
            If the folder is not empty and ``overwrite`` is not set, is being written by another run, or cannot be
            written.
        ArtifactError
            If what was read back is not what was written.
        """
        from octavo.saving import save

        with (
            Lock(path),
            self.job.witness.blamed(),
            showing(self.job.progress if progress is None else progress) as self.job.progress,
        ):
            return save(self, Path(path), overwrite=overwrite, report=report)

    def forget_workspace(self) -> None:
        """Remove the folder of unfinished work, once it is saved: the encoded forms lie there."""
        forget(self.workspace)
        if self.lock is not None:
            self.lock.release()


@with_progress
@fast_matmul()
def compress(
    source: str | Path | nn.Module | Source,
    *,
    ratio: float | None = None,
    size: str | int | None = None,
    bits: float | None = None,
    target: str = "disk",
    speedup: float | None = None,
    latency: str | float | None = None,
    shape: str | Sequence[int] | None = None,
    data: Any = None,
    forward_args: Callable[[Batch], Any] | None = None,
    objective: str | Objective | None = None,
    curvature: str = "kfac",
    methods: Sequence[str] | None = None,
    preset: str = "default",
    ignore: Iterable[str] = (),
    keep: Mapping[str, str] | None = None,
    plan: str | Path | None = None,
    workspace: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    memory: str | int | None = None,
    executor: str | Executor | None = None,
    progress: Shown = None,
) -> Compressed:
    """Compress a source to the size asked for.

    Parameters
    ----------
    source
        A ``transformers`` folder, a ``.safetensors`` file or index, or any module.
    ratio, size, bits
        The budget, exactly one of them: original bytes over artifact bytes, bytes (``"11MB"``), or bits per weight.
    target
        What the budget counts: ``disk``, the bytes of the artifact's files, ``memory``, those that all tensors take
        while the model runs from packed codes (``octavo.load(path, packed=True)``), or ``speed``.
    speedup, latency, shape
        The budget for ``speed``, exactly one of the first two: times as fast as the source in PyTorch in float32, or
        seconds (``"5ms"``), at ``shape`` sequences x tokens (1 x 32 if not given), on this machine with onnxruntime
        (:func:`octavo.targets.speed.compress_for_speed`). Its methods and preset are its own.
    data
        A file or list of texts for a text model, or an iterable of batches, such as a ``DataLoader``; a single tensor
        or mapping is one batch. Without any, the built-in English text serves a text model, and other sources are
        compressed without data. Of a tuple longer than ``forward`` takes, such as inputs with labels, the first
        element goes in; keys that ``forward`` does not know are left out. Batches whose rows point to each other,
        such as graphs, are held back whole.
    forward_args
        Says for each batch what the module is called with: a tuple of positional or a mapping of keyword arguments,
        as in ``lambda batch: (batch.x, batch.edge_index)``.
    objective
        ``cosine``, ``kl``, ``squared`` or an :class:`~octavo.calibration.objective.Objective`; chosen by the source if
        not given.
    curvature
        How errors are weighed against each other: ``kfac``, by inputs and by outputs apart, or ``ekfac``, which
        measures both together in a second pass over the data (:mod:`octavo.calibration.curvature`): more exact, for
        more memory. It needs data and a model that fits in memory.
    methods
        Names of methods or families to use; those of the preset if not given.
    preset
        ``fast``, ``default`` or ``best``.
    ignore, keep
        Globs of site names to leave alone, and a mapping of globs to choices such as ``float16`` or ``gptq:bits=4``.
    plan
        A plan file to carry out instead of allocating: to its budget exactly as :func:`octavo.plan` wrote it, to the
        letter if it was edited.
    workspace
        Folder for unfinished work or a saved profile, which takes about the bytes of the artifact; a temporary one
        if not given. Where temporary files lie in memory, name a folder beside the output for a large model.
    resume
        Use finished steps found in ``workspace``.
    memory
        The most that the run may take (``"6GB"``); by default three quarters of what the machine has. A model that does
        not fit in it as a whole is run block by block.
    executor
        Where sites are profiled and encoded: ``local`` threads, ``ray`` for workers of a Ray cluster on this machine,
        ``ray://host:port`` for those of another. The bytes are the same.
    progress
        None for bars with the time left where standard error is a terminal or this is a notebook, True or False for
        bars or silence, or a callable that is given a step's name, how much of it is done and how much there is.

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

    Warns
    -----
    OctavoWarning
        Once for every kind of note about the run, such as sites for which there was too little data.
    """
    made = {
        "ratio": ratio, "size": size, "bits": bits, "speedup": speedup, "latency": latency, "shape": shape,
        "curvature": curvature, "methods": methods, "preset": preset, "plan": plan, "memory": memory,
        "executor": executor,
    }  # fmt: skip
    check_target(target, named(made, _USUAL))
    if target == SPEED:
        fast = _for_speed(
            source, speedup=speedup, latency=latency, shape=shape, data=data, forward_args=forward_args,
            objective=objective, ignore=ignore, keep=keep, workspace=workspace, resume=resume, seed=seed,
            progress=progress,
        )  # fmt: skip
        warn(fast.notes, _DEPTH)
        return fast
    if workspace is not None:
        workspace = checked_output(workspace)
    clock = _Clock()
    job = open_job(
        source, data, objective, methods, preset, ignore, keep or {}, seed, callback(progress), memory, target,
        curvature, forward_args, work=Path(workspace) if workspace and resume else None,
    )  # fmt: skip
    given = None if plan is None else requested_plan(job, Path(plan), ratio, size, bits)
    asked = requested_budget(job, ratio, size, bits) if given is None else given.budget
    if given is None:
        refuse_unreachable(job, asked)
    if not resume:
        refuse_full_disk(job, Path(workspace or tempfile.gettempdir()), asked.bytes, preset)
    clock.lap("open")
    # A killed run leaves its workspace to be resumed, and a temporary one to be swept: never both.
    folder = Path(workspace or tempfile.mkdtemp(prefix="octavo-"))
    lock = None if workspace is None else Lock(folder)
    try:
        with job.witness.blamed(), executors.executor(executor) as job.executor:
            bare = given is not None and not (resume and holds_profile(folder, describe(job, preset)))
            if bare:
                if methods is not None:
                    raise RequestError("a plan says which method every site gets: leave methods out, and edit the plan")
                # To carry out a plan nothing needs to be measured but what sites there are.
                job.methods = [get_method("keep")]
            room = workspace_of(job, folder, preset, resume=resume)
            calibration = job.calibrate(room)
            clock.lap("evidence")
            around = None if bare else asked.bytes * 8 / job.source.weights
            profile = build_profile(job, calibration, room, around, preset, corrected=not bare)
            if profile.smallest > asked.bytes and not bare:
                # Settings far coarser than the budget were not tried; what can be reached at all depends on them.
                profile = build_profile(job, calibration, room, 0.0, preset)
            clock.lap("profile")
            if given is None:
                spared = asked.bytes - reserve(job, asked.bytes, preset)
                free = asked if profile.smallest > spared else replace(asked, bytes=spared)
                chosen = allocate(profile, free, margin=margin_of(target))
                clock.lap("plan")
                # Whoever names methods gets no other.
                plain = methods is None or any(method.name == PLAIN for method in job.methods)
                best, rival = contest(job, profile, calibration, room, chosen, free, plain=plain)
                clock.lap("encode")
                best = reconstruct(job, calibration, best, asked.bytes, preset)
                clock.lap("reconstruct")
            else:
                best, profile = carry_out(job, profile, calibration, room, given)
                rival = None
                clock.lap("encode")
            job.witness.check(every=True)
    except BaseException:
        if workspace is None:
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            lock.release()
        raise
    done = Compressed(job, profile, calibration, asked, best, rival, preset, clock.laps, workspace=folder, lock=lock)
    if workspace is None:
        # The encoded forms lie there until they are saved.
        weakref.finalize(done, shutil.rmtree, folder, ignore_errors=True)
    warn(done.notes, _DEPTH)
    return done


def _for_speed(source: Any, **request: Any) -> Compressed:
    from octavo.targets.speed import compress_for_speed

    return compress_for_speed(source, **request)


class _Clock:
    """Seconds by step."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now
