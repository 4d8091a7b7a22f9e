"""A finished compression for speed: the artifact and the file that runs it, written and measured together."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from octavo.errors import OctavoError
from octavo.pipeline import Compressed
from octavo.report.schema import Report, Section
from octavo.runtimes.onnx.exporting import TOLERANCE, check_graph, write_model
from octavo.runtimes.onnx.given import Tokens
from octavo.runtimes.onnx.graph import trace
from octavo.runtimes.onnx.kernels import lower
from octavo.runtimes.onnx.latency import compare, machine
from octavo.runtimes.onnx.opened import open_model
from octavo.runtimes.onnx.sessions import Session
from octavo.saving import check_writable, write_report
from octavo.system.atomic import made_aside, move_into_place
from octavo.system.locks import Lock
from octavo.system.progress import Shown
from octavo.targets.speed.asked import Asked
from octavo.targets.speed.search import DENSE, Anchors, divergences, runs

MODEL = "model.onnx"


@dataclass(kw_only=True)
class Fast(Compressed):
    """A finished compression for speed, to be saved.

    Parameters
    ----------
    kernels
        Site to kernel, of the sites that the exported graph runs.
    measured
        Of the exported model as built: ``seconds``, ``speedup``, ``divergence`` and what was ``asked``.
    """

    kernels: dict[str, str]
    measured: dict[str, Any]
    anchors: Anchors
    asked: Asked

    def save(self, path: str | Path, *, overwrite: bool = False, report: bool = True, progress: Shown = None) -> Report:
        """Write the artifact and ``model.onnx`` in it, both read back and measured; returns the report.

        Parameters
        ----------
        path, overwrite, report, progress
            As for :meth:`octavo.Compressed.save`.

        Raises
        ------
        RequestError
            If the folder is not empty and ``overwrite`` is not set.
        ArtifactError
            If what was read back is not what was written.
        """
        path = Path(path).resolve()
        with Lock(path):
            return self._saved(path, overwrite=overwrite, report=report, progress=progress)

    def _saved(self, path: Path, *, overwrite: bool, report: bool, progress: Shown) -> Report:
        check_writable(path, overwrite=overwrite, source=self.job.source.path)
        aside = made_aside(path)
        try:
            folder = aside / "artifact"
            data = super().save(folder, report=report, progress=progress)
            data = replace(data, sections=(*data.sections, speed_section(self._export(folder))))
            write_report(data, folder, page=report)
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
        job = self.job
        opened = open_model(folder)
        model, kinds = trace(opened.source)
        forms = {name: opened.forms[name] for name in kinds}
        difference = check_graph(opened.source, model, forms, dtypes=opened.dtypes)
        size = write_model(lower(model, forms, self.kernels).SerializeToString(), folder / MODEL, Tokens(opened.source))
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
            "bytes": size,
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
            "machine": asdict(machine(torch.get_num_threads())),
            "notes": notes,
        }  # fmt: skip


def speed_section(speed: Mapping[str, Any]) -> Section:
    """What the report says about the exported model, of the figures that were measured of it."""
    device, (batch, tokens), far = speed["machine"], speed["shape"], speed["divergence"]
    kernels = ", ".join(f"{count} on {name}" for name, count in sorted(speed["kernels"].items()))
    text = (
        f"{speed['file']} runs with onnxruntime {device['onnxruntime']}: {speed['speedup']:.2f} times as fast as "
        f"PyTorch {device['torch']} in float32 ({speed['seconds'] * 1e3:.3g} ms against "
        f"{speed['torch_seconds'] * 1e3:.3g} ms at {batch} x {tokens} tokens, {device['threads']} threads, "
        f"{device['processor']}), {far['metric']} {far['mean']:.3g} on {far['examples']} held-back examples. "
        f"Matrices by kernel: {kernels}."
    )
    rows = [(name, 1e3 * found["seconds"]) for name, found in speed["runtimes"].items()]
    rows.append((speed["file"], 1e3 * speed["seconds"]))
    return Section(
        "speed", "Speed", text, ("Runs with", "Milliseconds"), tuple(rows), tuple(speed["notes"]), figures=speed
    )
