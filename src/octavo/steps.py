"""Single steps of the way through, run on their own: profile, plan, frontier, evaluate."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from octavo import job as jobs
from octavo.allocate import Plan, allocate
from octavo.artifact import MANIFEST, Artifact
from octavo.budget import budget as budget_of
from octavo.compress import Compressed, compress
from octavo.curves import build_profile
from octavo.errors import MissingExtraError, RequestError
from octavo.finish import MARGIN, finish, single_families
from octavo.job import Progress, silent
from octavo.objective import Objective
from octavo.profile import Profile
from octavo.request import describe, open_job
from octavo.sites import Source
from octavo.workspace import Workspace

_REQUEST = "request.json"


def profile(
    source: str | Path | nn.Module | Source,
    out: str | Path,
    *,
    data: Any = None,
    objective: str | Objective | None = None,
    methods: Sequence[str] | None = None,
    preset: str = "default",
    ignore: Iterable[str] = (),
    keep: Mapping[str, str] | None = None,
    resume: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> Profile:
    """Measure the curves of a source over all sizes and save them in the folder ``out``.

    Parameters are those of :func:`octavo.compress`. Give the folder to ``compress`` as ``workspace`` with ``resume``,
    or to :func:`plan`, to solve it for any budget.

    Raises
    ------
    RequestError
        If something about the request or the source cannot be served.
    """
    job = open_job(source, data, objective, methods, preset, ignore, keep or {}, seed, progress)
    room = Workspace(Path(out), describe(job, preset), resume=resume)
    result = build_profile(job, job.calibrate(room), room, None, preset)
    room.write_json(
        _REQUEST,
        {
            "data": str(data) if isinstance(data, str | Path) else None,
            "objective": objective if isinstance(objective, str) else None,
            "methods": list(methods) if methods else None,
            "preset": preset,
            "ignore": list(ignore),
            "keep": dict(keep or {}),
            "seed": seed,
        },
    )
    return result


def request_of(folder: str | Path) -> dict[str, Any]:
    """The keyword arguments with which a saved profile was made."""
    file = Path(folder) / _REQUEST
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise RequestError(f"{folder}: not a finished profile, {_REQUEST} cannot be read: {error}") from error


def plan(folder: str | Path, *, ratio: float | None = None, size: str | None = None, bits: float | None = None) -> Plan:
    """Solve a saved profile for a budget; no weights are read.

    Raises
    ------
    BudgetError
        If the budget cannot be reached.
    """
    saved = Profile.load(Path(folder) / "profile.json")
    asked = budget_of(saved.original_bytes, saved.weights, ratio=ratio, size=size, bits=bits)
    # Carried out as it is, a plan must not exceed its budget by the little that interpolated points miss.
    return allocate(saved, asked, margin=MARGIN)


def frontier(
    source: str | Path | nn.Module | Source,
    ratios: Sequence[float],
    *,
    workspace: str | Path,
    families: bool = False,
    progress: Progress = silent,
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
        Other keyword arguments of :func:`octavo.compress`.

    Returns
    -------
    list of dict
        Per ratio ``ratio``, ``budget``, ``bytes``, ``used``, ``quality``, ``uniform``, ``winner`` and, if asked for,
        ``families``.
    """
    profile(source, workspace, resume=True, progress=progress, **request)
    rows = []
    for ratio in ratios:
        done = compress(source, ratio=ratio, workspace=workspace, resume=True, progress=progress, **request)
        row: dict[str, Any] = {
            "ratio": done.ratio,
            "asked": ratio,
            "budget": done.budget.bytes,
            "bytes": done.built.bytes,
            "used": done.built.bytes / done.budget.bytes,
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
    room = Workspace(workspace, describe(done.job, done.preset), resume=True)
    plans = single_families(done.profile, done.budget)
    return {
        plan.notes[0]: finish(done.job, done.profile, done.calibration, room, plan, done.budget).quality
        for plan in plans
    }


def evaluate(
    path: str | Path,
    *,
    data: Any = None,
    against: str | Path | None = None,
    metric: str = "divergence",
    objective: str | Objective | None = None,
) -> dict[str, Any]:
    """Measure a source or an artifact.

    Parameters
    ----------
    path
        A model folder or an artifact.
    data
        Texts (``divergence``), or a CSV of sentence, sentence, score (``spearman``); the built-in text by default.
    against
        The source to compare with, for ``divergence``.
    metric
        ``divergence`` (mean and 95th percentile of the objective against ``against``) or ``spearman`` (correlation of
        cosine similarities with human scores).

    Raises
    ------
    RequestError
        If the metric is not known, or what it needs is missing.
    """
    path = Path(path)
    source = _open(path)
    if metric == "spearman":
        return {
            "path": str(path),
            "metric": metric,
            **_spearman(source, data, jobs.choose_objective(source, objective)),
        }
    if metric != "divergence":
        raise RequestError(f"metric {metric!r} is not known; choose divergence or spearman")
    if against is None:
        raise RequestError("divergence compares with a source: give it as --against")
    reference = jobs.open_source(against)
    batches, text = jobs.load_data(reference, data, limit=None)
    if reference.module is None or source.module is None or not batches:
        raise RequestError(f"{against}: divergence needs a model that runs, and data for it")
    wanted = jobs.choose_objective(reference, objective)
    losses = wanted.measure(source.module, batches, wanted.reference(reference.module, batches))
    return {
        "path": str(path),
        "metric": wanted.metric,
        "data": text,
        "examples": len(losses),
        "mean": float(losses.mean()),
        "p95": float(losses.quantile(0.95)),
    }


def _open(path: Path) -> Source:
    if not (path / MANIFEST).exists():
        return jobs.open_source(path)
    from octavo.verify import load

    Artifact(path)
    model = load(path)
    if not isinstance(model, nn.Module):
        raise RequestError(f"{path}: holds bare tensors, there is no model to run")
    source = jobs.open_source(model)
    source.path, source.is_transformers = path, True
    return source


def _spearman(source: Source, data: Any, wanted: Objective) -> dict[str, Any]:
    from octavo.integrations.transformers import text_batches

    try:
        from scipy.stats import spearmanr
    except ImportError as error:
        raise MissingExtraError("spearman needs scipy, which is not installed: pip install 'octavo[hf]'") from error
    if data is None or source.path is None or source.module is None:
        raise RequestError("spearman needs a sentence encoder and --data with lines of sentence,sentence,score")
    try:
        with open(data, encoding="utf-8", newline="") as file:
            rows = [(row[0], row[1], float(row[2])) for row in csv.reader(file) if len(row) >= 3]
    except (OSError, ValueError, csv.Error) as error:
        raise RequestError(f"{data}: not a CSV of sentence, sentence, score: {error}") from error
    if len(rows) < 2:
        raise RequestError(f"{data}: has {len(rows)} pairs, at least 2 are needed")
    texts = sorted({text for row in rows for text in row[:2]}, key=len)
    with torch.inference_mode():
        vectors = torch.cat([wanted.outputs(source.module, batch) for batch in text_batches(source.path, texts)])
    place = {text: index for index, text in enumerate(texts)}
    similarity = [float(vectors[place[a]] @ vectors[place[b]]) for a, b, _ in rows]
    return {"pairs": len(rows), "spearman": float(spearmanr(similarity, [score for *_, score in rows]).statistic)}
