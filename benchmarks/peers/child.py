"""Runs one tool on one task, in a process and an environment of its own: `python -m peers.child TOOL TASK.json`.

Beside the task it writes `weights.safetensors`, the dequantised weights, and `result.json`: bits of every tensor,
seconds, peak memory, latency, or the error.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path
from statistics import median
from typing import Any

import torch
from models import SPEECH
from safetensors.torch import save_file

from peers.base import Compressed, Task

#: Interleaved pairs of passes that latency is the median ratio of; fewer of a model that takes seconds for one.
PAIRS, FEWER = 9, 3


def measure(tool: str, task: Task, arguments: dict[str, Any], out: Path) -> dict[str, Any]:
    """Run the tool; what there is to say about it."""
    peer = importlib.import_module(f"peers.{tool}")
    torch.manual_seed(0)
    started = time.perf_counter()
    made: Compressed = peer.compress(task, **arguments)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    save_file(made.weights, out / "weights.safetensors")
    made.weights.clear()
    latency, note = None, None
    if made.runtime is not None:
        try:
            latency = relative_latency(made, task)
        except Exception as error:
            note = f"latency: {type(error).__name__}: {error}"
    return {"bits": made.bits, "seconds": seconds, "peak_memory": peak, "latency": latency, "note": note}


def relative_latency(made: Compressed, task: Task) -> float:
    """Time of one sequence over that of float32 PyTorch, interleaved, so that the load of the machine cancels."""
    assert made.runtime is not None
    batch, dense = task.probe(), task.load()
    ratios = []
    # Not inference mode, which the tensors of some tools do not bear.
    with torch.no_grad():
        made.runtime(batch), dense(**batch)
        for _ in range(FEWER if task.model == SPEECH else PAIRS):
            times = []
            for run in (made.runtime, lambda batch: dense(**batch)):
                started = time.perf_counter()
                run(batch)
                times.append(time.perf_counter() - started)
            ratios.append(times[0] / times[1])
    return median(ratios)


def main() -> None:
    """Read the task, run it, write the result; an error of the tool is a result as well."""
    tool, file = sys.argv[1], Path(sys.argv[2])
    asked = json.loads(file.read_text(encoding="utf-8"))
    out = file.parent
    scratch = out / "scratch"
    scratch.mkdir(exist_ok=True)
    task = Task(asked["model"], Path(asked["folder"]), Path(asked["data"]), scratch)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    try:
        result = measure(tool, task, asked["arguments"], out)
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    (out / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
