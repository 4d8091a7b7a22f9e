"""Compress a Llama of TinyLlama's shape with calibration in a stated memory, at a quarter of its depth and at the whole.

    python benchmarks/large_calibrated.py [--keep '*=rtn:bits=4,group=128']

writes docs/results/large-calibrated.json: peak memory of a process that runs the command line, its seconds, and both per
billion weights. On a machine that others use as well, processor seconds tell more than those of the clock. Models are
kept in the cache (8 GB of disk are needed).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import shapes
from common import CACHE, save_results

from octavo.sources.texts import builtin_texts

_SHAPE, _QUARTER, _LIMIT = "1.1b", 6, "6GB"
_TEXTS = 24


def model_of_depth(layers: int) -> Path | None:
    """The model's folder; None if the disk is too small."""
    folder = CACHE / "shapes" / f"{_SHAPE}-{layers}"
    if not (folder / "config.json").exists() and shapes.make(_SHAPE, folder, layers) is None:
        return None
    return folder


def measured(source: Path, keep: str | None, preset: str, bits: float) -> dict[str, Any]:
    """What a process of its own took to compress a model."""
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        texts, out = Path(folder) / "texts.txt", Path(folder) / "out"
        texts.write_text("\n".join(builtin_texts()[:_TEXTS]), encoding="utf-8")
        words = [
            "compress", source, "--bits", bits, "--preset", preset, "--data", texts, "--memory", _LIMIT, "--out", out,
            *(("--keep", keep) if keep else ()),
        ]  # fmt: skip
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-c", "from octavo.cli import main; main()", *map(str, words)], stdout=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        if status:
            sys.exit(f"octavo compress failed on {source}")
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    weights = report["source"]["parameters"]
    cpu = usage.ru_utime + usage.ru_stime
    return {
        "layers": json.loads((source / "config.json").read_text())["num_hidden_layers"],
        "weights": weights,
        "bytes": report["artifact"]["bytes"],
        "peak_memory": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "seconds": seconds,
        "cpu_seconds": cpu,
        "seconds_per_billion_weights": seconds / weights * 1e9,
        "cpu_seconds_per_billion_weights": cpu / weights * 1e9,
        "timings": report["timings"],
        "quality": report["quality"],
        "calibration": report["calibration"]["text"],
    }


def main() -> None:
    """Measure both depths."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keep", help="a choice for all sites, as of octavo compress, in place of the preset's search")
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--bits", type=float, default=4.6)
    given = parser.parse_args()
    rows = []
    for layers in (_QUARTER, shapes.SHAPES[_SHAPE].layers):
        source = model_of_depth(layers)
        if source is None:
            return
        rows.append(measured(source, given.keep, given.preset, given.bits))
        print(json.dumps({key: rows[-1][key] for key in ("layers", "peak_memory", "seconds", "cpu_seconds")}))
    small, large = rows
    save_results(
        "large-calibrated",
        {
            "shape": _SHAPE,
            "memory_limit": _LIMIT,
            "setting": given.keep or f"preset {given.preset}",
            "rows": rows,
            "linear": large["cpu_seconds_per_billion_weights"] / small["cpu_seconds_per_billion_weights"],
            "memory_growth": large["peak_memory"] / small["peak_memory"],
        },
    )


if __name__ == "__main__":
    main()
