"""The same work in threads and on Ray workers: bytes and seconds of profiling and encoding MiniLM.

    python benchmarks/executors.py

writes docs/results/executors.json. Evidence is gathered once, in this process; a run of each executor warms it up.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from pathlib import Path
from typing import Any

from common import CACHE, brown, minilm, save_results

import octavo
from octavo.system.executors import Executor, Local, RayExecutor

RATIO = 8


def measured(executor: Executor, evidence: Path, texts: list[str]) -> dict[str, Any]:
    """Seconds of the steps that an executor does, and a digest of the artifact."""
    work = CACHE / "executors" / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(evidence, work)
    started = time.perf_counter()
    done = octavo.compress(minilm(), ratio=RATIO, data=texts, workspace=work, resume=True, executor=executor)
    seconds = time.perf_counter() - started
    done.save(work / "artifact", overwrite=True)
    files = sorted((work / "artifact").glob("*.safetensors"))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return {
        "executor": executor.describe(), "seconds": seconds, "profile": done.timings["profile"],
        "encode": done.timings["encode"], "digest": digest,
    }  # fmt: skip


def main() -> None:
    """Measure one thread, two threads and two Ray workers, twice each, and keep the faster turn."""
    texts, _ = brown()
    evidence = CACHE / "executors" / "evidence"
    shutil.rmtree(evidence, ignore_errors=True)
    octavo.compress(minilm(), ratio=RATIO, data=texts, workspace=evidence, methods=["keep", "rtn"])
    for made in ("curves", "points"):
        shutil.rmtree(evidence / made)
    for file in ("profile.json", "job.json"):
        (evidence / file).unlink(missing_ok=True)
    rows: list[dict[str, Any]] = []
    for make in (lambda: Local(1), lambda: Local(2), lambda: RayExecutor(workers=2)):
        with make() as executor:
            turns = [measured(executor, evidence, texts) for _ in range(2)]
        rows.append(min(turns, key=lambda turn: turn["profile"] + turn["encode"]))
        print(rows[-1], flush=True)
    one = rows[0]["profile"] + rows[0]["encode"]
    for row in rows:
        row["speedup"] = one / (row["profile"] + row["encode"])
    save_results("executors", {"ratio": RATIO, "rows": rows, "same_bytes": len({row["digest"] for row in rows}) == 1})


if __name__ == "__main__":
    main()
