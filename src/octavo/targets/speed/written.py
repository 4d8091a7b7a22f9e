"""The file that runs a plan for speed: written beside the artifact, and measured from the disk."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from octavo.encoding.result import Result
from octavo.encoding.section import Section
from octavo.runtimes.onnx.exporting import TOLERANCE, check_graph, write_model
from octavo.runtimes.onnx.given import Tokens
from octavo.runtimes.onnx.graph import trace
from octavo.runtimes.onnx.kernels import lower
from octavo.runtimes.onnx.latency import compare, machine
from octavo.runtimes.onnx.opened import dense_forms, open_model
from octavo.runtimes.onnx.sessions import Session
from octavo.sources.source import Source
from octavo.targets.speed.search import DENSE, WIDE, Timed, divergences, runs

MODEL = "model.onnx"
_FILE = "this file"
#: Seconds that the comparison with the source takes.
_SECONDS = 4.0


@dataclass(frozen=True)
class Written:
    """The exported model as it was written.

    Parameters
    ----------
    difference
        How far outputs of the graph with float kernels are from the artifact's, relative to the largest.
    size
        Bytes of the file.
    """

    difference: float
    size: int


def write(timed: Timed, folder: Path) -> Written:
    """Export the artifact in a folder as ``model.onnx`` beside it."""
    opened = open_model(folder)
    model, kinds = trace(opened.source)
    forms = {name: opened.forms[name] for name in kinds}
    difference = check_graph(opened.source, model, forms, dtypes=opened.dtypes)
    content = lower(model, forms, timed.kernels).SerializeToString()
    return Written(difference, write_model(content, folder / MODEL, Tokens(opened.source)))


def measured(result: Result, folder: Path, written: Written) -> dict[str, Any]:
    """Speed and loss of the file in a folder: what ``report.json`` holds under ``speed``."""
    opened, asked, session = result.opened, result.own.asked, Session(folder / MODEL)
    losses = divergences(opened, session)
    # Times that are shown side by side are of one comparison, whose calls alternate.
    sessions = {_FILE: session, WIDE: _wide(opened.source)}
    taken = compare(runs(opened.source, asked.shape, sessions, bfloat16=True), DENSE, seconds=_SECONDS)
    own = taken.pop(_FILE)
    seconds, speedup = own["seconds"], own["speedup"]
    met = speedup >= asked.speedup if asked.seconds is None else seconds <= asked.seconds
    notes = [] if met else ["measured once more from the disk, the file is slower than asked for"]
    notes += [] if speedup >= 1 else ["the exported model is slower than the dense one in PyTorch"]
    return {
        "file": MODEL,
        "bytes": written.size,
        "asked": asked.words,
        "met": met,
        "shape": list(asked.shape),
        "seconds": seconds,
        "torch_seconds": taken[DENSE]["seconds"],
        "speedup": speedup,
        "divergence": {
            "metric": opened.objective.metric,
            "mean": float(losses.mean()),
            "p95": float(losses.quantile(0.95)),
            "examples": len(losses),
        },
        "difference": written.difference,
        "tolerance": TOLERANCE,
        "kernels": dict(Counter(session.kernels.values())),
        "sites": session.kernels,
        "runtimes": {name: {"seconds": row["seconds"]} for name, row in taken.items()},
        "machine": asdict(machine(torch.get_num_threads())),
        "notes": notes,
    }


def _wide(source: Source) -> Session:
    """The graph of a source with all of its weights in float32."""
    model, kinds = trace(source)
    forms = {name: form for name, form in dense_forms(source).items() if name in kinds}
    return Session(lower(model, forms, {}).SerializeToString())


def section(speed: dict[str, Any]) -> Section:
    """The report's section on the exported model."""
    kernels = ", ".join(f"{count} on {name}" for name, count in sorted(speed["kernels"].items()))
    device, (batch, tokens), far = speed["machine"], speed["shape"], speed["divergence"]
    text = (
        f"{speed['file']} runs with onnxruntime {device['onnxruntime']}: {speed['speedup']:.2f} times as fast as "
        f"PyTorch {device['torch']} in float32 ({speed['seconds'] * 1e3:.3g} ms against "
        f"{speed['torch_seconds'] * 1e3:.3g} ms at {batch} x {tokens} tokens, medians of alternating calls, "
        f"{device['threads']} threads, {device['processor']}), {far['metric']} {far['mean']:.3g} on {far['examples']} "
        f"held-out examples. Matrices by kernel: {kernels}."
    )
    rows = [(_FILE, 1e3 * speed["seconds"]), *((n, 1e3 * row["seconds"]) for n, row in speed["runtimes"].items())]
    return Section(
        "speed",
        "Speed",
        text,
        ("runtime", f"ms a call at {batch} x {tokens} tokens"),
        tuple(rows),
        tuple(speed["notes"]),
        speed,
    )
