"""Compressing for speed: a latency on this machine as the budget, and a file that was seen to meet it.

Every matrix is offered as it is, in the forms that integer kernels run, and as two factors. What a point costs is
seconds, measured on this machine by shape and kernel; what it loses is the expected loss of its weights and of its
inputs, which such kernels round as well. The solver is that of :mod:`octavo.allocate`.
"""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from octavo.allocate import Plan, solve
from octavo.artifact import Packed, unpack
from octavo.budget import Budget
from octavo.calibrate import Calibration, Evidence
from octavo.compress import Compressed
from octavo.errors import BudgetError, OctavoError, RequestError
from octavo.export import SHAPE, TOLERANCE, check_graph, dense_forms, open_model, parse_shape, probe, write_model
from octavo.finish import Built
from octavo.forms import Form
from octavo.integrations.onnx import Session, require
from octavo.job import Job, Progress, silent
from octavo.methods import Setting, get_method
from octavo.objective import Objective
from octavo.profile import Curve, Point, Profile
from octavo.publish import check_writable, move_into_place
from octavo.request import describe, open_job
from octavo.runtimes.activations import Ranges, rounding_loss, watch
from octavo.runtimes.graph import open_inputs, trace
from octavo.runtimes.kernels import FLOAT, kernel_of, lower
from octavo.runtimes.latency import Table, compare, machine
from octavo.sites import Site, Source
from octavo.workspace import Workspace, write_file

MODEL = "model.onnx"
#: The baseline that speed is counted against.
DENSE = "torch float32"
#: Plans aim this share below the latency asked for; two measurements of one file differ by as much.
_RESERVE = 0.04
_ROUNDS = 5
#: Groups of columns of the blockwise kernel, the first that divides a matrix.
_WIDTHS = (64, 128, 32, 16)
#: Ranks of factored layers, as shares of the rank at which two factors have as many elements as the matrix.
_RANKS = (0.5, 0.25)
_FACTOR_BITS = 6


@dataclass(frozen=True)
class Candidate:
    """One way to store and run a site.

    Parameters
    ----------
    seconds
        Of the site alone, at the shape asked for.
    loss
        Expected increase of the model's loss, from weights and rounded inputs.
    """

    method: str
    setting: Setting
    kernel: str
    bytes: int
    seconds: float
    loss: float


@dataclass
class Anchors:
    """Whole models that were measured, which tie the sum of a plan's sites to the latency of a file.

    Parameters
    ----------
    seconds
        By name: PyTorch in float32 and bfloat16, and the exported graph in float32 and with all sites at their fastest.
    """

    seconds: dict[str, float]
    fixed: float
    scale: float

    def of(self, sites: float) -> float:
        """Seconds of a whole file whose sites take ``sites`` seconds in sum."""
        return self.fixed + self.scale * sites


@dataclass
class Fast:
    """A finished compression for speed, to be saved.

    Parameters
    ----------
    done
        The artifact to be.
    kernels
        Site to kernel, of the sites that the exported graph runs.
    measured
        Of the exported model as built: ``seconds``, ``speedup``, ``divergence`` and what was ``asked``.
    """

    done: Compressed
    kernels: dict[str, str]
    measured: dict[str, Any]
    anchors: Anchors
    asked: Asked

    def save(self, path: str | Path, *, overwrite: bool = False) -> dict[str, Any]:
        """Write the artifact and ``model.onnx`` in it, both read back and measured; returns the report's data.

        Raises
        ------
        RequestError
            If the folder is not empty and ``overwrite`` is not set.
        ArtifactError
            If what was read back is not what was written.
        """
        path = Path(path).resolve()
        check_writable(path, overwrite=overwrite, source=self.done.job.source.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            folder = aside / "artifact"
            data = self.done.save(folder)
            data["speed"] = self._export(folder)
            write_file(folder / "report.json", json.dumps(data).encode())
            with open(folder / "README.md", "a", encoding="utf-8") as card:
                card.write(card_section(data["speed"]))
            move_into_place(folder, path)
        except OSError as error:
            raise OctavoError(
                f"{path}: cannot be written: {error.strerror or error}; nothing was left there"
            ) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return data

    def _export(self, folder: Path) -> dict[str, Any]:
        """Export the artifact that was written, and measure the file."""
        job = self.done.job
        opened = open_model(folder)
        model, kinds = trace(opened.source)
        forms = {name: opened.forms[name] for name in kinds}
        difference = check_graph(opened.source, model, forms)
        size = write_model(lower(model, forms, self.kernels).SerializeToString(), folder / MODEL, opened.source)
        session = Session(folder / MODEL)
        losses = divergences(job, session)
        taken = compare(runs(job.source, self.asked.shape, {"exported": session}), DENSE, seconds=4.0)
        kernels: dict[str, int] = {}
        for kernel in session.kernels.values():
            kernels[kernel] = kernels.get(kernel, 0) + 1
        speedup = taken["exported"]["speedup"]
        met = (
            speedup >= self.asked.speedup
            if self.asked.seconds is None
            else (taken["exported"]["seconds"] <= self.asked.seconds)
        )
        notes = [] if met else ["measured once more from the disk, the file is slower than asked for"]
        notes += [] if speedup >= 1 else ["the exported model is slower than the dense one in PyTorch"]
        return {
            "file": MODEL,
            **size,
            "asked": self.asked.words,
            "met": met,
            "shape": list(self.asked.shape),
            "seconds": taken["exported"]["seconds"],
            "torch_seconds": taken[DENSE]["seconds"],
            "speedup": speedup,
            "divergence": {"metric": job.objective.metric, "mean": float(losses.mean()),
                           "p95": float(losses.quantile(0.95)), "examples": len(losses)},
            "difference": difference,
            "tolerance": TOLERANCE,
            "kernels": kernels,
            "sites": session.kernels,
            "runtimes": {name: {"seconds": value} for name, value in self.anchors.seconds.items()},
            "machine": machine(torch.get_num_threads()),
            "notes": notes,
        }  # fmt: skip


def card_section(speed: Mapping[str, Any]) -> str:
    """What the card says about the exported model."""
    kernels = ", ".join(f"{count} on {name}" for name, count in sorted(speed["kernels"].items()))
    device, (batch, tokens) = speed["machine"], speed["shape"]
    notes = "".join(f"\n\nNote: {note}." for note in speed["notes"])
    return (
        f"\n## Speed\n\n`{speed['file']}` runs with onnxruntime {device['onnxruntime']}: {speed['speedup']:.2f} times "
        f"as fast as PyTorch {device['torch']} in float32 ({speed['seconds'] * 1e3:.3g} ms against "
        f"{speed['torch_seconds'] * 1e3:.3g} ms at {batch} x {tokens} tokens, {device['threads']} threads, "
        f"{device['processor']}), {speed['divergence']['metric']} {speed['divergence']['mean']:.3g} on held-back data. "
        f"Matrices by kernel: {kernels}.{notes}\n"
    )


@dataclass(frozen=True)
class Asked:
    """The speed that was asked for: a factor over PyTorch in float32, or seconds; the other is 0 or None."""

    shape: tuple[int, int]
    speedup: float = 0.0
    seconds: float | None = None

    @property
    def words(self) -> str:
        """The request in the user's words."""
        return f"speedup {self.speedup:g}" if self.seconds is None else f"latency {self.seconds * 1e3:g}ms"

    def allowed(self, dense: float) -> float:
        """Seconds that the model may take where the dense one takes ``dense``."""
        return dense / self.speedup if self.seconds is None else self.seconds


def parse_latency(text: str | float) -> float:
    """Seconds of ``5ms``, ``0.8 s``, ``300us``, or of a plain number of seconds."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(us|ms|s|)\s*", str(text).lower())
    if not match or not float(match[1]) > 0:
        raise RequestError(f"latency {text!r} is not a time; write it like 5ms, 300us or 0.8s")
    return float(match[1]) * {"us": 1e-6, "ms": 1e-3}.get(match[2], 1.0)


def asked_for(speedup: float | None, latency: str | float | None, shape: str | Sequence[int]) -> Asked:
    """The request from exactly one of ``speedup`` and ``latency``.

    Raises
    ------
    RequestError
        If none or both are given, or a number is none.
    """
    if (speedup is None) == (latency is None):
        raise RequestError(
            "for speed, give exactly one of speedup and latency (such as --speedup 2.5 or --latency 5ms)"
        )
    if speedup is None:
        assert latency is not None
        return Asked(parse_shape(shape), seconds=parse_latency(latency))
    if not math.isfinite(speedup) or speedup <= 0:
        raise RequestError(f"speedup {speedup!r} is not a positive finite number")
    return Asked(parse_shape(shape), speedup=float(speedup))


def compress_for_speed(
    source: str | Path | nn.Module | Source,
    *,
    speedup: float | None = None,
    latency: str | float | None = None,
    shape: str | Sequence[int] = SHAPE,
    data: Any = None,
    objective: str | Objective | None = None,
    ignore: Iterable[str] = (),
    keep: Mapping[str, str] | None = None,
    workspace: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> Fast:
    """Compress a model so that onnxruntime runs it as fast as asked for, with as little loss as that allows.

    Parameters
    ----------
    speedup
        Times as fast as the source in PyTorch in float32, on this machine with the same threads, at ``shape``.
    latency
        Or seconds at ``shape``: ``"5ms"``.
    shape
        Sequences and tokens, ``"1x32"``.
    source, data, objective, ignore, keep, workspace, resume, seed, progress
        As for :func:`octavo.compress`. ``ignore`` and ``keep`` sites run in float32, unless what is kept is a form that
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
    asked = asked_for(speedup, latency, shape)
    job = open_job(source, data, objective, _METHODS, "best", ignore, keep or {}, seed, progress)
    if not job.measurable:
        raise RequestError(f"{job.source.title}: speed needs a model that runs, and data for it")
    with nullcontext(workspace) if workspace else tempfile.TemporaryDirectory(prefix="octavo-") as folder:
        room = Workspace(Path(folder), {**describe(job, "best"), "target": "speed"}, resume=resume)
        clock = time.perf_counter()
        calibration = job.calibrate(room)
        timings = {"evidence": time.perf_counter() - clock}
        search = _Search(job, calibration, room, asked)
        built, kernels, measured = search.run()
        timings["encode"] = time.perf_counter() - clock - timings["evidence"]
    done = Compressed(job, search.profile, calibration, built.plan.budget, built, None, "best", timings)
    done.workspace = None if workspace is None else Path(workspace)
    return Fast(done, kernels, measured, search.anchors, asked)


_METHODS = ("keep", "int8", "gptq", "activation-svd")


class _Search:
    """Finds the plan of least loss within the latency asked for."""

    def __init__(self, job: Job, calibration: Calibration, room: Workspace, asked: Asked) -> None:
        self.job, self.calibration, self.room, self.asked = job, calibration, room, asked
        self.model, kinds = trace(job.source)
        self.dense = {name: form for name, form in dense_forms(job.source).items() if name in kinds}
        self.difference = check_graph(job.source, self.model, self.dense)
        known = {site.name for site in job.sites}
        self.matrices = [name for name, kind in kinds.items() if kind == "Site" and name in known]
        self.inputs = open_inputs(self.model)
        self.smoothing: dict[str, Setting] = {}
        self.table = Table(math.prod(asked.shape))
        self.ranges = watch(job.source, self.matrices, job.calibration_data)
        self.candidates = {site.name: self._candidates(site) for site in job.sites}
        self.table.save()
        self.anchors = self._anchors()
        curves = [Curve(site.name, site.kind, site.shape, _distinct(self.candidates[site.name])) for site in job.sites]
        source = job.source
        self.profile = Profile(source.title, source.fingerprint(), source.original_bytes, source.weights, 0, curves)

    def run(self) -> tuple[Built, dict[str, str], dict[str, Any]]:
        """The plan, built, and what was measured of it."""
        names = list(self.candidates)
        width = max(map(len, self.candidates.values()))
        costs = np.full((len(names), width), 2**62, dtype=np.int64)
        losses = np.full((len(names), width), np.inf)
        for row, name in enumerate(names):
            found = self.candidates[name]
            costs[row, : len(found)] = [round(c.seconds * self.anchors.scale * 1e9) for c in found]
            losses[row, : len(found)] = [c.loss for c in found]
        dense = self.anchors.seconds[DENSE]
        allowed = self.asked.allowed(dense) * (1 - _RESERVE)
        aim = allowed
        best: tuple[Built, dict[str, str], dict[str, Any]] | None = None
        fastest = 0.0
        for attempt in range(_ROUNDS):
            left = max(round((aim - self.anchors.fixed) * 1e9), int(costs.min(1).sum()))
            chosen = {name: self.candidates[name][k] for name, k in zip(names, solve(costs, losses, left), strict=True)}
            built, kernels, session = self._build(chosen)
            taken = compare(runs(self.job.source, self.asked.shape, {"exported": session}), DENSE)["exported"]
            self.job.progress("measure", attempt + 1, _ROUNDS)
            fastest = max(fastest, taken["speedup"])
            measured = {**taken, "divergence": built.quality, "asked": self.asked.words}
            # The machine may have been busier, or less so, when the baseline was measured: the ratio is what counts.
            seconds = dense / taken["speedup"] if self.asked.seconds is None else taken["seconds"]
            if seconds <= allowed and (best is None or built.quality < best[0].quality):
                best = (built, kernels, measured)
            if (attempt and best is not None) or 0.97 * allowed <= seconds <= allowed:
                break
            if left <= int(costs.min(1).sum()) and seconds > allowed:
                break
            aim *= allowed / seconds
        if best is None:
            limit = math.floor(fastest * (1 - _RESERVE) * 100) / 100
            raise BudgetError(
                f"{self.asked.words} at {self.asked.shape[0]} x {self.asked.shape[1]} tokens cannot be reached on this "
                f"machine: the fastest file measured is {fastest:.2f} times as fast as PyTorch in float32. "
                f"Ask for a speedup of at most {limit:g}.",
                limit,
            )
        return best

    def _build(self, chosen: Mapping[str, Candidate]) -> tuple[Built, dict[str, str], Session]:
        """Encode a plan, export it, and measure what it loses when onnxruntime runs it."""
        job = self.job
        packed = {name: self._encode(job.site(name), c.method, c.setting) for name, c in chosen.items()}
        forms = {name: self._form(name, packed[name]) if name in packed else self.dense[name] for name in self.dense}
        kernels = {name: chosen[name].kernel for name in self.matrices}
        session = Session(lower(self.model, forms, kernels).SerializeToString())
        contents = job.contents(packed, torch.float16 if job.kept_dtype() else None)
        points = {name: Point(c.method, {**c.setting}, packed[name].bytes, c.loss) for name, c in chosen.items()}
        total = contents.bytes
        self.profile.fixed_bytes = total - sum(item.bytes for item in packed.values())
        plan = Plan(
            Budget(total, self.asked.words), points, sum(c.loss for c in chosen.values()), self.profile.fixed_bytes
        )
        losses = divergences(job, session)
        return (
            Built(plan, packed, contents, total, float(losses.mean()), float(losses.quantile(0.95))),
            kernels,
            session,
        )

    def _encode(self, site: Site, method: str, setting: Setting) -> Packed:
        return self.job.encode(site, method, setting, self.calibration, self.room)

    def _form(self, name: str, packed: Packed) -> Form:
        site = self.job.site(name)
        return unpack(memoryview(packed.blob), packed.parts, packed.meta, (site.rows, site.columns))

    def _candidates(self, site: Site) -> list[Candidate]:
        """All ways to store and run a site; what the graph does not multiply with is kept in 16 bits, if it fits."""
        job = self.job
        choices: list[tuple[str, Setting]]
        if site.name in job.pinned:
            choices = [job.pinned[site.name]]
        else:
            dtypes = [s["dtype"] for s in get_method("keep").settings(job.matrix(site), self._evidence(site))]
            choices = [("keep", {"dtype": "float16" if "float16" in dtypes else dtypes[0]})]
            if site.name in self.matrices:
                choices += self._choices(site)
        found = [self._candidate(site, method, setting) for method, setting in choices]
        job.progress("profile", job.sites.index(site) + 1, len(job.sites))
        return found

    def _choices(self, site: Site) -> list[tuple[str, Setting]]:
        choices: list[tuple[str, Setting]] = [("int8", self._smoothing(site))]
        width = next((width for width in _WIDTHS if site.columns % width == 0), None)
        choices += [] if width is None else [("gptq", {"bits": 8, "group": width})]
        ranks = [int(share * site.parameters / (site.rows + site.columns)) for share in _RANKS]
        return choices + [("activation-svd", {"rank": rank, "bits": _FACTOR_BITS}) for rank in ranks if rank >= 8]

    def _smoothing(self, site: Site) -> Setting:
        """The smoothing of least expected loss for all sites that read the same values and so share their rounding."""
        value = self.inputs[site.name]
        if value not in self.smoothing:
            group = [self.job.site(name) for name in self.matrices if self.inputs[name] == value]
            settings = get_method("int8").settings(self.job.matrix(site), self._evidence(site))
            losses = [sum(self._candidate(other, "int8", setting).loss for other in group) for setting in settings]
            self.smoothing[value] = settings[int(np.argmin(losses))]
        return self.smoothing[value]

    def _evidence(self, site: Site) -> Evidence:
        return self.calibration.evidence[site.name]

    def _candidate(self, site: Site, method: str, setting: Setting) -> Candidate:
        packed = self._encode(site, method, setting)
        form = self._form(site.name, packed)
        evidence = self._evidence(site)
        loss = evidence.loss(form.dense() - self.job.matrix(site))
        if site.name not in self.matrices:
            return Candidate(method, setting, FLOAT, packed.bytes, 0.0, loss)
        kernel = kernel_of(form)
        ranges: Ranges | None = self.ranges.get(site.name)
        if ranges is None:
            kernel = FLOAT
        else:
            loss += rounding_loss(form, kernel, evidence, ranges)
        return Candidate(method, setting, kernel, packed.bytes, self.table.seconds(form, kernel), loss)

    def _anchors(self) -> Anchors:
        """Measure whole models, and fit what the sites' sum leaves out."""
        job = self.job
        fastest = {name: min(self.candidates[name], key=lambda c: c.seconds) for name in self.matrices}
        forms = dict(self.dense)
        for name, candidate in fastest.items():
            forms[name] = self._form(name, self._encode(job.site(name), candidate.method, candidate.setting))
        kernels = {name: candidate.kernel for name, candidate in fastest.items()}
        sessions = {
            "onnxruntime float32": Session(lower(self.model, self.dense, {}).SerializeToString()),
            "onnxruntime fastest": Session(lower(self.model, forms, kernels).SerializeToString()),
        }
        taken = compare(runs(job.source, self.asked.shape, sessions, bfloat16=True), DENSE, seconds=4.0)
        whole, quick = (taken[name]["least"] for name in sessions)
        plain = sum(self.table.seconds(self.dense[name], FLOAT) for name in self.matrices)
        least = sum(candidate.seconds for candidate in fastest.values())
        # Alone, a site finds its weights in the cache, and does not share the rounding of its inputs with others.
        scale = max((whole - quick) / max(plain - least, 1e-9), 0.1)
        return Anchors({name: row["least"] for name, row in taken.items()}, max(quick - scale * least, 0.0), scale)


def _distinct(candidates: Sequence[Candidate]) -> list[Point]:
    return [Point(c.method, dict(c.setting), c.bytes, c.loss) for c in candidates]


def divergences(job: Job, session: Session) -> torch.Tensor:
    """Divergence of every held-back example when onnxruntime runs the model."""
    assert job.source.module is not None
    return job.objective.measure(session, job.held_data, job.objective.reference(job.source.module, job.held_data))


def runs(
    source: Source, shape: tuple[int, int], sessions: Mapping[str, Session], *, bfloat16: bool = False
) -> dict[str, Any]:
    """Calls to compare: the source in PyTorch, and sessions, on the same tokens."""
    assert source.module is not None
    batch = probe(source, shape)
    modules = {DENSE: source.module}
    if bfloat16:
        modules["torch bfloat16"] = copy.deepcopy(source.module).bfloat16()
    calls: dict[str, Any] = {name: partial(module, **batch) for name, module in modules.items()}
    return calls | {name: partial(run.session.run, None, run.feed(batch)) for name, run in sessions.items()}
