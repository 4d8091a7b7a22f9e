"""A model larger than memory, compressed without data: peak memory and time by depth, and a resumed run.

    python benchmarks/large.py WORK [--shape 7b] [--layers 8 32] [--limit 4e9] [--size 2GB]

For every depth a model of random weights is made in the folder WORK (:mod:`shapes`), compressed by the command in a
process of its own, measured, and removed. The first is compressed once more, killed in the middle, and resumed: its
bytes must be the same. Results go to ``docs/results/large.json``, beside those of other depths that are there; a depth
for which the disk is too small is skipped with a message. Seconds of the processor are reported beside those of the
clock, which other work disturbs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import load_results, save_results, stat_bytes
from shapes import SHAPES, make

_COMMAND = [sys.executable, "-c", "from octavo.cli import main; main()", "compress"]


#: The budget without --size.
_BUDGET = "--ratio 4"


def words(source: Path, out: Path, budget: str) -> list[str]:
    """The command line of a compression."""
    return [*_COMMAND, str(source), "--preset", "data-free", *budget.split(), "--out", str(out), "--json"]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that counts."""
    found = {}
    for file in sorted([*folder.glob("model*"), folder / "octavo.json"]):
        with open(file, "rb") as opened:
            found[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return found


def run(source: Path, out: Path, layers: int, budget: str) -> dict[str, Any]:
    """Compress in a process of its own and measure it."""
    load, started = os.getloadavg()[0], time.perf_counter()
    process = subprocess.Popen(words(source, out, budget), stdout=subprocess.PIPE)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    report = json.loads(said or b"{}")
    if status or "artifact" not in report:
        sys.exit(f"{layers} layers: octavo compress ended with status {status}: {report.get('message', '')}")
    billions = report["source"]["parameters"] / 1e9
    processor = usage.ru_utime + usage.ru_stime
    return {
        "layers": layers,
        "asked": budget,
        "weights": report["source"]["parameters"],
        "source_bytes": report["source"]["bytes"],
        "artifact_bytes": stat_bytes(out),
        "ratio": report["source"]["bytes"] / stat_bytes(out),
        "used": report["artifact"]["used"],
        "relative_error": report["quality"]["value"],
        "peak_memory": usage.ru_maxrss * 1024,
        "seconds": seconds,
        "processor_seconds": processor,
        "seconds_per_billion_weights": seconds / billions,
        "processor_seconds_per_billion_weights": processor / billions,
        "timings": report["timings"],
        "load_average": [load, os.getloadavg()[0]],
    }


def resumed(source: Path, out: Path, budget: str) -> dict[str, Any]:
    """Compress, kill when half of the sites are encoded, and resume."""
    work = out.parent / f".{out.name}.octavo-work"
    sites = len(json.loads((source / "model.safetensors.index.json").read_text())["weight_map"])
    process = subprocess.Popen(words(source, out, budget), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(work.glob("points/*.bin"))) < sites // 3:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(list(work.glob("points/*.bin")))
    subprocess.run([*words(source, out, budget), "--resume"], check=True, stdout=subprocess.DEVNULL)
    return {"killed_after_sites": kept, "digests": digests(out)}


def main() -> None:
    """Measure every depth."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="7b")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--limit", type=float, default=4e9, help="peak memory allowed, bytes")
    parser.add_argument("--size", help="a size to ask for, such as 2GB, in place of ratio 4")
    given = parser.parse_args()
    budget = f"--size {given.size}" if given.size else _BUDGET
    given.work.mkdir(parents=True, exist_ok=True)
    known = load_results("large")
    if known.get("shape") != given.shape:
        known = {"rows": [], "resumed": {}}
    known["rows"] = [{"asked": _BUDGET, **row} for row in known["rows"]]
    rows = [row for row in known["rows"] if row["layers"] not in given.layers or row["asked"] != budget]
    again = known["resumed"]
    for layers in sorted(given.layers):
        source, out = given.work / f"model-{layers}", given.work / f"out-{layers}"
        try:
            if make(given.shape, source, layers) is None:
                continue
            rows.append(run(source, out, layers, budget))
            print(json.dumps(rows[-1], indent=1), flush=True)
            if not again:
                first = digests(out)
                shutil.rmtree(out)
                again = resumed(source, out, budget)
                again = {"layers": layers, **again, "same_bytes": again["digests"] == first}
                print(json.dumps(again, indent=1), flush=True)
        finally:
            for folder in (source, out, given.work / f".{out.name}.octavo-work"):
                shutil.rmtree(folder, ignore_errors=True)
    if not rows:
        return
    rows.sort(key=lambda row: (row["asked"], row["layers"]))
    alike = [row for row in rows if row["asked"] == _BUDGET] or rows
    key = "processor_seconds_per_billion_weights"
    checks = {
        "peak_memory_within_limit": all(row["peak_memory"] <= given.limit for row in rows),
        "time_of_deepest_over_shallowest_per_weight": alike[-1][key] / alike[0][key],
        "clock_of_deepest_over_shallowest_per_weight": alike[-1]["seconds_per_billion_weights"]
        / alike[0]["seconds_per_billion_weights"],
        "resumed_run_has_the_same_bytes": again["same_bytes"],
    }
    print(json.dumps(checks, indent=1))
    note = "data-free; random bfloat16 weights; other work ran on the machine beside it (load_average)"
    save_results("large", {"shape": given.shape, "note": note, "rows": rows, "resumed": again, "checks": checks})


if __name__ == "__main__":
    main()
