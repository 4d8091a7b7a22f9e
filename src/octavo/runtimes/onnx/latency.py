"""Run times of forms on this machine, measured once and kept in a small table.

A table is only valid for one machine, runtime version and number of threads; each combination has its own file. Entries
are by shape and kernel, since the values of weights do not matter.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from octavo.forms import Form
from octavo.runtimes.onnx.graph import OPSET
from octavo.runtimes.onnx.kernels import graph_run, multiply
from octavo.runtimes.onnx.nodes import Nodes, finished
from octavo.runtimes.onnx.sessions import Session, require
from octavo.system.atomic import write_file

#: The folder of tables.
CACHE = "OCTAVO_CACHE"
_ROUNDS, _SECONDS = 15, 0.15


@dataclass(frozen=True)
class Machine:
    """What a latency depends on beside shape and kernel: processor, cores, threads of the run, and versions."""

    processor: str
    cores: int | None
    threads: int
    onnxruntime: str
    torch: str


def machine(threads: int) -> Machine:
    """What this machine is, when a run has so many threads."""
    _, runtime = require()
    return Machine(_processor(), os.cpu_count(), threads, runtime.__version__, torch.__version__)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        flags = next(line for line in lines if line.startswith("flags"))
        # The CPU name does not reveal which instructions a virtual machine supports.
        return name + "".join(f" {flag}" for flag in ("avx2", "avx512_vnni", "avx_vnni", "amx_int8") if flag in flags)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class Table:
    """Seconds by shape and kernel, measured on first use.

    Parameters
    ----------
    positions
        Rows of the input matrix: batch times tokens.
    threads
        Threads of the runtime; those of torch by default.
    folder
        The folder of the table; by default ``OCTAVO_CACHE``, or ``~/.cache/octavo``.
    """

    def __init__(self, positions: int, *, threads: int | None = None, folder: Path | None = None) -> None:
        self.positions, self.threads = positions, threads or torch.get_num_threads()
        self.machine = machine(self.threads)
        key = hashlib.sha256(json.dumps(asdict(self.machine), sort_keys=True).encode()).hexdigest()[:12]
        folder = folder or Path(os.environ.get(CACHE, Path.home() / ".cache" / "octavo"))
        self.file = folder / f"latency-{key}.json"
        self.entries: dict[str, float] = self._read()
        self.measured = 0

    def _read(self) -> dict[str, float]:
        try:
            data = json.loads(self.file.read_text(encoding="utf-8"))
            return {str(key): float(value) for key, value in data["seconds"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            # A damaged table only costs the time to measure again.
            return {}

    def seconds(self, form: Form, kernel: str) -> float:
        """Seconds that a form takes on a kernel, from the table or measured now."""
        key = f"{self.positions} {signature(form, kernel)}"
        if key not in self.entries:
            self.entries[key] = self._measure(form, kernel)
            self.measured += 1
        return self.entries[key]

    def save(self) -> None:
        """Save the measurements; entries written by others meanwhile are kept."""
        if self.measured:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.entries = {**self._read(), **self.entries}
            write_file(
                self.file, json.dumps({"machine": asdict(self.machine), "seconds": self.entries}, indent=1).encode()
            )
            self.measured = 0

    def _measure(self, form: Form, kernel: str) -> float:
        rows, columns = form.shape
        x = torch.randn(self.positions, columns, generator=torch.Generator().manual_seed(0))
        nodes, empty = Nodes(["x", "y"]), Nodes(["x", "y"])
        nodes.add("Identity", [multiply(nodes, "w", "x", form, kernel)], outputs=["y"])
        empty.add("Identity", ["x"], outputs=["y"])
        sessions = [
            Session(finished(part, columns, width, OPSET), threads=self.threads).session
            for part, width in ((nodes, rows), (empty, columns))
        ]
        feed = {"x": x.numpy()}
        whole, empty_run = (lambda session=session: session.run(None, feed) for session in sessions)
        taken = compare({"whole": whole, "call": empty_run}, "whole", seconds=_SECONDS)
        return max(taken["whole"]["least"] - taken["call"]["least"], 1e-7)


def signature(form: Form, kernel: str) -> str:
    """Kernel and shapes of a form, which determine its run time."""
    run = graph_run(form)
    if parts := run.steps(kernel):
        return "+".join(signature(part, kernel) for part in parts)
    rows, columns = form.shape
    return f"{kernel}:{rows}x{columns}{run.detail(kernel)}"


def compare(
    runs: Mapping[str, Callable[[], Any]], base: str, *, rounds: int = _ROUNDS, seconds: float = 2.0
) -> dict[str, dict[str, float]]:
    """Time several calls alternately, so that other load on the machine affects all equally.

    There are at least ``rounds`` rounds, and more until ``seconds`` have passed. Every second one goes backwards, since
    a call finds the caches as the one before it left them.

    Returns
    -------
    dict
        By name: ``seconds``, the median; ``least`` seconds, least affected by other load, for sums and differences; and
        ``speedup``, the median over rounds of the time of ``base`` divided by the time of the call.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for call in runs.values():
            call()
        started = time.perf_counter()
        while len(times[base]) < rounds or (time.perf_counter() - started < seconds and len(times[base]) < 40 * rounds):
            order = -1 if len(times[base]) % 2 else 1
            for name, call in list(runs.items())[::order]:
                begin = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - begin)
    return {
        name: {
            "seconds": statistics.median(taken),
            "least": min(taken),
            "speedup": statistics.median(b / t for b, t in zip(times[base], taken, strict=True)),
        }
        for name, taken in times.items()
    }
