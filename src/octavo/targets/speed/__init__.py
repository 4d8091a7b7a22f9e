"""Compressing for speed: a latency on this machine as the budget, and a file that was seen to meet it."""

from __future__ import annotations

import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from octavo.artifact.writing import split_name
from octavo.calibration import inputs
from octavo.calibration.objective import Objective
from octavo.encoding.job import Job
from octavo.errors import BudgetError, RequestError
from octavo.opening import open_job, workspace_of
from octavo.runtimes.onnx.exporting import SHAPE
from octavo.runtimes.onnx.given import Tokens, check_tokens_only
from octavo.runtimes.onnx.sessions import require
from octavo.sources.batches import Batch
from octavo.sources.sentences import members
from octavo.sources.sites import Source
from octavo.system.locks import Lock
from octavo.system.progress import Progress, Shown, callback, with_progress
from octavo.targets.speed.asked import Asked, asked_for
from octavo.targets.speed.fast import Fast
from octavo.targets.speed.search import Search, offered

__all__ = ["Fast", "compress_for_speed", "speed_frontier"]


@with_progress
def compress_for_speed(
    source: str | Path | nn.Module | Source,
    *,
    speedup: float | None = None,
    latency: str | float | None = None,
    shape: str | Sequence[int] | None = None,
    data: Any = None,
    forward_args: Callable[[Batch], Any] | None = None,
    objective: str | Objective | None = None,
    ignore: Iterable[str] = (),
    keep: Mapping[str, str] | None = None,
    workspace: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    progress: Shown = None,
) -> Fast:
    """Compress a model so that onnxruntime runs it as fast as asked for, with as little loss as that allows.

    Parameters
    ----------
    speedup
        Times as fast as the source in PyTorch in float32, on this machine with the same threads, at ``shape``.
    latency
        Or seconds at ``shape``: ``"5ms"``.
    shape
        Sequences and tokens, ``"1x32"`` if not given.
    source, data, forward_args, objective, ignore, keep, workspace, resume, seed, progress
        As for :func:`octavo.pipeline`. ``ignore`` and ``keep`` sites run in float32, unless what is kept is a form that
        an integer kernel runs.

    Raises
    ------
    RequestError
        If something about the request or the source cannot be served.
    BudgetError
        If even the fastest plan is slower; its ``limit`` is the speedup that can be reached.
    MissingExtraError
        If the extra ``onnx`` is not installed.
    """
    require()
    asked = asked_for(speedup, latency, SHAPE if shape is None else shape)
    clock = time.perf_counter()
    job = _open(source, data, objective, ignore, keep, seed, callback(progress), forward_args)
    Tokens(job.source).batch(asked.shape)
    folder = Path(workspace or tempfile.mkdtemp(prefix="octavo-"))
    lock = None if workspace is None else Lock(folder)
    try:
        with job.witness.blamed():
            search = _search(job, folder, asked, resume)
            fast = _found(search, asked, folder, {"encode": time.perf_counter() - clock})
    except BaseException:
        if workspace is None:
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            lock.release()
        raise
    if lock is not None:
        fast.lock = lock
        weakref.finalize(fast, lock.release)
    else:
        # The encoded forms lie there until they are saved.
        weakref.finalize(fast, shutil.rmtree, folder, ignore_errors=True)
    return fast


@with_progress
def speed_frontier(
    source: str | Path | nn.Module | Source,
    speedups: Sequence[float],
    *,
    workspace: str | Path,
    shape: str | Sequence[int] = SHAPE,
    data: Any = None,
    objective: str | Objective | None = None,
    ignore: Iterable[str] = (),
    keep: Mapping[str, str] | None = None,
    seed: int = 0,
    progress: Shown = None,
) -> list[dict[str, Any]]:
    """Build, write and measure a compression at each speed; what all have in common is measured once.

    Parameters
    ----------
    speedups
        Times as fast as the source in PyTorch in float32.
    workspace
        Folder for encoded forms, used again if it is there, and for the artifacts, ``speedup-2.5`` and so on.

    Returns
    -------
    list of dict
        Per speedup ``asked``, ``speedup``, ``seconds``, ``divergence``, ``bytes`` of the artifact, ``kernels``, or the
        ``error`` of one that cannot be reached.
    """
    require()
    wanted = [asked_for(speedup, None, shape) for speedup in speedups]
    job = _open(source, data, objective, ignore, keep, seed, callback(progress))
    folder = Path(workspace)
    with Lock(folder):
        search = _search(job, folder / "work", wanted[0], resume=True)
        return [_row(search, asked, folder) for asked in wanted]


def _row(search: Search, asked: Asked, folder: Path) -> dict[str, Any]:
    """What was measured at one speed, or why it cannot be reached."""
    try:
        fast = _found(search, asked, folder / "work", {})
    except BudgetError as error:
        return {"asked": asked.speedup, "error": str(error)}
    data = fast.save(folder / f"speedup-{asked.speedup:g}", overwrite=True)
    found = data["speed"]
    return {
        "asked": asked.speedup,
        **{key: found[key] for key in ("speedup", "seconds", "kernels", "met")},
        "divergence": found["divergence"]["mean"],
        "bytes": data["artifact"]["bytes"],
    }


def _open(
    source: str | Path | nn.Module | Source,
    data: Any,
    objective: str | Objective | None,
    ignore: Iterable[str],
    keep: Mapping[str, str] | None,
    seed: int,
    progress: Progress,
    forward_args: Callable[[Batch], Any] | None = None,
) -> Job:
    opened = inputs.open_source(source, progress=progress)
    if opened.folder is not None and members(opened.folder):
        beside = sorted(name for name in opened.shapes if split_name(name)[0])
        if beside:
            raise RequestError(
                f"{opened.title}: has layers behind its transformer ({beside[0]}), which a file for onnxruntime would "
                "leave out; compress for disk"
            )
        opened = replace(opened, transformer_only=True)
    job = open_job(
        opened, data, objective, offered(), "best", ignore, keep or {}, seed, progress, forward_args=forward_args,
        folding=False,
    )  # fmt: skip
    check_tokens_only(job.source)
    scaled = next((site.name for site in job.sites if site.layout.exponent), None)
    if scaled is not None:
        raise RequestError(
            f"{job.source.title}: the weights of {scaled!r} are of a size that no kernel of a graph takes; compress "
            "for disk, or scale them"
        )
    if not job.measurable:
        raise RequestError(f"{job.source.title}: speed needs a model that runs, and data for it")
    return job


def _search(job: Job, folder: Path, asked: Asked, resume: bool) -> Search:
    room = workspace_of(job, folder, "best", resume=resume, target="speed")
    calibration = job.calibrate(room)
    if job.source.is_skeleton:
        raise RequestError(f"{job.source.title}: does not fit in memory, and an exported graph holds the whole of it")
    return Search(job, calibration, room, asked.shape)


def _found(search: Search, asked: Asked, folder: Path, timings: dict[str, float]) -> Fast:
    built, kernels, measured = search.run(asked)
    budget = built.plan.budget
    return Fast(
        search.job, search.profile, search.calibration, budget, built, None, "best", timings, folder,
        kernels=kernels, measured=measured, anchors=search.anchors, asked=asked,
    )  # fmt: skip
