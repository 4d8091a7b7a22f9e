"""Single steps of the way through, run on their own: profile, plan, frontier."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from octavo.allocation.budget import budget as budget_of
from octavo.allocation.curves import build_profile
from octavo.allocation.plans import Plan
from octavo.allocation.profiles import Profile
from octavo.allocation.solver import allocate
from octavo.calibration.objective import Objective
from octavo.encoding.disk_use import refuse_full_disk
from octavo.encoding.finish import finish, margin_of, single_families
from octavo.errors import RequestError
from octavo.opening import open_job, workspace_of
from octavo.pipeline import Compressed, compress
from octavo.sources.batches import Batch
from octavo.sources.sites import Source
from octavo.system import executors
from octavo.system.executors import Executor
from octavo.system.locks import Lock
from octavo.system.matmul import fast_matmul
from octavo.system.notes import by_kind, warn
from octavo.system.paths import checked, reason
from octavo.system.progress import Shown, callback, with_progress
from octavo.system.sealed import unsealed_json

_REQUEST = "request.json"
#: Frames between :func:`profile` and its caller.
_DEPTH = 4


@with_progress
@fast_matmul()
def profile(
    source: str | Path | nn.Module | Source,
    out: str | Path,
    *,
    data: Any = None,
    forward_args: Callable[[Batch], Any] | None = None,
    objective: str | Objective | None = None,
    curvature: str = "kfac",
    methods: Sequence[str] | None = None,
    preset: str = "default",
    ignore: Iterable[str] = (),
    keep: Mapping[str, str] | None = None,
    resume: bool = False,
    seed: int = 0,
    target: str = "disk",
    memory: str | int | None = None,
    executor: str | Executor | None = None,
    progress: Shown = None,
) -> Profile:
    """Measure the curves of a source over all sizes and save them in the folder ``out``.

    Parameters are those of :func:`octavo.pipeline`. Give the folder to ``compress`` as ``workspace`` with ``resume``,
    or to :func:`plan`, to solve it for any budget.

    Raises
    ------
    RequestError
        If something about the request or the source cannot be served.
    """
    ignore = ignore if isinstance(ignore, str) else list(ignore)
    job = open_job(
        source, data, objective, methods, preset, ignore, keep or {}, seed, callback(progress), memory, target,
        curvature, forward_args, work=Path(out) if resume else None,
    )  # fmt: skip
    request = {
        "data": str(data) if isinstance(data, str | Path) else None,
        "objective": objective if isinstance(objective, str) else None,
        "curvature": curvature,
        "methods": list(methods) if methods else None,
        "preset": preset,
        "ignore": list(ignore),
        "keep": dict(keep or {}),
        "seed": seed,
        "target": target,
    }
    if not resume:
        refuse_full_disk(job, Path(out), 0, preset)
    with Lock(out), job.witness.blamed(), executors.executor(executor) as job.executor:
        room = workspace_of(job, Path(out), preset, resume=resume)
        result = build_profile(job, job.calibrate(room), room, None, preset)
        room.write_json(_REQUEST, request)
        job.witness.check(every=True)
    warn(by_kind(room.damaged, ()), _DEPTH)
    return result


def request_of(folder: str | Path) -> dict[str, Any]:
    """The keyword arguments with which a saved profile was made."""
    file = checked(folder) / _REQUEST
    try:
        return unsealed_json(file.parent, file.name, file.read_bytes())
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise RequestError(f"{folder}: not a finished profile, {_REQUEST} cannot be read: {reason(error)}") from error


def plan(folder: str | Path, *, ratio: float | None = None, size: str | None = None, bits: float | None = None) -> Plan:
    """Solve a saved profile for a budget; no weights are read.

    Raises
    ------
    BudgetError
        If the budget cannot be reached.
    """
    saved = Profile.load(Path(folder) / "profile.json")
    asked = budget_of(
        saved.original_bytes, saved.weights, ratio=ratio, size=size, bits=bits, target=saved.options["target"]
    )
    chosen = allocate(saved, asked, margin=margin_of(asked.target))
    # Profiles of earlier versions do not say what was pinned.
    pinned = tuple(saved.options.get("pinned", ()))
    return replace(chosen, fingerprint=saved.fingerprint, pinned=pinned)


@with_progress
def frontier(
    source: str | Path | nn.Module | Source,
    ratios: Sequence[float],
    *,
    workspace: str | Path,
    families: bool = False,
    progress: Shown = None,
    **request: Any,
) -> list[dict[str, Any]]:
    """Build and measure a compression at each ratio.

    Parameters
    ----------
    ratios
        Ratios to build.
    workspace
        Folder for the profile, which is made once; one that is there is used.
    families
        Also build the best plan of every single family at the same bytes.
    request
        Other keyword arguments of :func:`octavo.pipeline`.

    Returns
    -------
    list of dict
        Per ratio ``ratio``, ``budget``, ``bytes``, ``used``, ``quality``, ``uniform``, ``winner`` and, if asked for,
        ``families``.
    """
    for ratio in ratios:
        # Before anything is measured.
        budget_of(1, 1, ratio=ratio)
    if not ratios:
        raise RequestError("ratios: give one at least, such as 8")
    profile(source, workspace, resume=True, progress=progress, **request)
    rows = []
    for ratio in ratios:
        done = compress(source, ratio=ratio, workspace=workspace, resume=True, progress=progress, **request)
        row: dict[str, Any] = {
            "ratio": done.ratio,
            "asked": ratio,
            "budget": done.budget.bytes,
            "bytes": done.built.bytes,
            "used": done.built.counted / done.budget.bytes,
            "quality": done.built.quality,
            "uniform": done.rival.quality if done.rival else None,
            "winner": done.built.plan.label,
        }
        if families:
            row["families"] = _families(done, Path(workspace))
        rows.append(row)
    return rows


def _families(done: Compressed, workspace: Path) -> dict[str, float]:
    """Measured quality of the best plan of every single family at the same bytes."""
    room = workspace_of(done.job, workspace, done.preset, resume=True)
    plans = single_families(done.profile, done.budget)
    return {
        plan.notes[0]: finish(done.job, done.profile, done.calibration, room, plan, done.budget).quality
        for plan in plans
    }
