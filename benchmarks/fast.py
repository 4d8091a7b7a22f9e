"""Where the time of a compression goes, by preset; and how long its artifact takes to load.

    python benchmarks/fast.py [--before SRC] [--models minilm,smollm2] [--presets fast,default]

writes docs/results/fast.json. Each run is a fresh process that has opened the original once, so imports do not count; at ratio 8,
with the built-in text. With ``--before``, the
``src`` folder of another checkout, both versions run in turn, so that the machine's load falls on both. About 15 minutes a
version on two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import load_results, save_results
from models import TITLES, model_folder

RATIO = 8
ROUNDS = 5


def measured(folder: str, preset: str, out: str) -> dict[str, Any]:
    """One run in this process: seconds and processor seconds of every stage, and of loading what it wrote."""
    import torch
    import transformers

    import octavo
    import octavo.pipeline
    import octavo.report
    from octavo.runtimes.packed.speed import interleaved
    from octavo.system.clock import Clock

    processor, last, lap = dict[str, float](), [time.process_time()], Clock.lap

    def lap_of_both(clock: Clock, name: str) -> None:
        lap(clock, name)
        now = time.process_time()
        processor[name] = processor.get(name, 0.0) + now - last[0]
        last[0] = now

    Clock.lap = lap_of_both  # type: ignore[method-assign]
    kind = transformers.AutoModel if "minilm" in folder.lower() else transformers.AutoModelForCausalLM
    # What libraries import to open such a model takes seconds, however small it is.
    kind.from_pretrained(folder)
    if kind is transformers.AutoModel:
        import sentence_transformers  # noqa: F401
    started, before = time.perf_counter(), time.process_time()
    last[0] = before
    done = octavo.compress(folder, ratio=RATIO, preset=preset, progress=False)
    report = done.save(out, overwrite=True, progress=False)
    seconds, used = time.perf_counter() - started, time.process_time() - before
    transformers.utils.logging.disable_progress_bar()

    def touched(path: str) -> None:
        # A mapped file is read when its pages are touched.
        for tensor in octavo.load(path).parameters():
            tensor.detach().sum()

    loads = {
        "original": lambda: kind.from_pretrained(folder),
        "original, touched": lambda: [p.detach().sum() for p in kind.from_pretrained(folder).parameters()],
        "artifact": lambda: kind.from_pretrained(out),
        "octavo.load, touched": lambda: touched(out),
        "decoding alone": lambda: octavo.Artifact(out).state(),
    }
    weights = done.profile.weights
    return {
        "weights": weights,
        "seconds": seconds,
        "processor_seconds": used,
        "seconds_per_100m": seconds / weights * 1e8,
        "stages": {name: report["timings"][name] for name in processor},
        "processor_stages": processor,
        "bytes": done.built.bytes,
        "quality_held_back": done.built.quality,
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "load": interleaved(loads, ROUNDS),
        "threads": torch.get_num_threads(),
    }


def fresh(source: Path, *words: str) -> dict[str, Any]:
    """One run with the package in ``source``, in a process of its own."""
    run = subprocess.run(
        [sys.executable, __file__, "--one", *words],
        env={**os.environ, "PYTHONPATH": str(source)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return dict(json.loads(run.stdout.splitlines()[-1]))


def main() -> None:
    """Measure every model and preset, before and after, and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="the src folder of another checkout")
    parser.add_argument("--models", default="minilm,smollm2")
    parser.add_argument("--presets", default="fast,default")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measured(*asked.one)))
        return
    sides = {"after": Path(__file__).resolve().parents[1] / "src"}
    if asked.before is not None:
        sides = {"before": asked.before.resolve(), **sides}
    rows = {(row["model"], row["preset"]): row for row in load_results("fast").get("rows", [])}
    for name in asked.models.split(","):
        for preset in asked.presets.split(","):
            found = {}
            for side, source in sides.items():
                with tempfile.TemporaryDirectory() as out:
                    found[side] = fresh(source, str(model_folder(name)), preset, f"{out}/artifact")
                print(name, preset, side, json.dumps(found[side]), flush=True)
            rows[TITLES[name], preset] = {"model": TITLES[name], "preset": preset, **found}
            words = " ".join(["--before SRC"] * (asked.before is not None))
            save_results("fast", {"ratio": RATIO, "rows": list(rows.values())}, words)


if __name__ == "__main__":
    main()
