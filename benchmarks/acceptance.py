"""What Octavo promises, measured on MiniLM: sizes met, quality against GPTQ, families, times. `make reproduce` runs it.

Writes docs/results/acceptance.json. About 15 minutes on two cores.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import CACHE, brown, load_results, minilm, save_results, shared_data, stat_bytes

import octavo
from octavo import coding
from octavo.calibration.objective import Cosine
from octavo.encoding.finish import finish, single_families
from octavo.saving import Compressed
from octavo.sources.tokens import text_batches

RATIOS = (2, 4, 6, 8, 12, 16, 24)


class Judge:
    """Held-out quality: 512 Brown sentences that calibration never saw."""

    def __init__(self, texts: list[str]) -> None:
        self.objective = Cosine()
        self.batches = text_batches(minilm(), texts)
        self.reference = self.objective.reference(self.model(minilm()), self.batches)

    @staticmethod
    def model(folder: Path) -> Any:
        """A model as users load it."""
        from transformers import AutoModel

        return AutoModel.from_pretrained(folder).eval()

    def __call__(self, folder: Path) -> float:
        model = self.model(folder)
        return float(self.objective.measure(model, self.batches, self.reference).mean())


def ratios(judge: Judge, texts: list[str], work: Path) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The seven ratios from one profile, each written, counted by stat, and judged; next to every single family."""
    started = time.perf_counter()
    octavo.profile(minilm(), work / "profile", data=texts, resume=True)
    times = {"profile": time.perf_counter() - started}
    rows = []
    for ratio in RATIOS:
        started = time.perf_counter()
        octavo.plan(work / "profile", ratio=ratio)
        planned = time.perf_counter() - started
        started = time.perf_counter()
        done = octavo.compress(minilm(), ratio=ratio, data=texts, workspace=work / "profile", resume=True)
        folder = work / f"ratio-{ratio}"
        report = done.save(folder, overwrite=True)
        written = time.perf_counter() - started
        size, budget = stat_bytes(folder), done.budget.bytes
        row = {
            "ratio": ratio, "budget": budget, "bytes": size, "used": size / budget, "note": report["artifact"]["note"],
            "quality": judge(folder), "held_back": done.built.quality, "plan": done.built.plan.label,
            "uniform_held_back": done.rival.quality if done.rival else done.built.quality,
            "uniform": _judge_built(done.rival, done, judge, work) if done.rival else None,
            "families": _families(done, judge, work), "plan_seconds": planned, "write_seconds": written,
        }  # fmt: skip
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows, times


def _judge_built(built: Any, done: Compressed, judge: Judge, work: Path) -> float:
    folder = work / "rival"
    replace(done, built=built, rival=None).save(folder, overwrite=True)
    return judge(folder)


def _families(done: Compressed, judge: Judge, work: Path) -> dict[str, dict[str, float]]:
    result = {}
    for plan in single_families(done.profile, done.budget):
        built = finish(done.run, done.profile, plan, done.budget)
        result[plan.notes[0]] = {
            "bytes": built.bytes,
            "held_back": built.quality,
            "quality": _judge_built(built, done, judge, work),
        }
    return result


def against_gptq(judge: Judge, texts: list[str], work: Path) -> list[dict[str, Any]]:
    """GPTQ of 4, 3 and 2 bits, group 64, embeddings as well, and Octavo in the same number of bytes.

    The rival's bytes are those of its artifact, with its codes entropy-coded by Octavo: fewer than it would take elsewhere.
    The pooler, which no sentence vector depends on, is rounded like every other layer.
    """
    rows = []
    for bits, most in ((4, 0.45), (3, 0.40), (2, 0.30)):
        keep = {"*": f"gptq:bits={bits},group=64", "embeddings.*": f"rtn:bits={bits},group=64"}
        rival = octavo.compress(minilm(), ratio=2, data=texts, keep=keep, methods=["keep"])
        rival.save(work / f"gptq-{bits}", overwrite=True)
        size = stat_bytes(work / f"gptq-{bits}")
        nominal = _nominal_bytes(rival, bits)
        done = octavo.compress(minilm(), size=size, data=texts, workspace=work / "profile", resume=True)
        done.save(work / f"octavo-{bits}", overwrite=True)
        theirs, ours = judge(work / f"gptq-{bits}"), judge(work / f"octavo-{bits}")
        row = {
            "rival": f"GPTQ int{bits} group 64", "rival_bytes": size, "rival_bytes_uncoded": nominal, "rival_quality": theirs,
            "bytes": stat_bytes(work / f"octavo-{bits}"), "quality": ours, "share": ours / theirs, "at_most": most,
        }  # fmt: skip
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def _nominal_bytes(done: Compressed, bits: int) -> int:
    """Bytes of the same choice packed at its nominal bits, with a float16 scale and a code-sized zero a group."""
    weights = sum(
        site.parameters * bits / 8 + site.rows * -(-site.columns // 64) * (2 + bits / 8) for site in done.opened.sites
    )
    kept = sum(math.prod(kept.shape) * 2 for kept in done.built.contents.kept.values())
    return int(weights + kept)


def unreachable() -> dict[str, Any]:
    """A ratio beyond reach is refused with exit code 3, and the limit that it names works."""
    command = [
        sys.executable,
        "-c",
        "from octavo.cli import main; main()",
        "compress",
        str(minilm()),
        "--ratio",
        "1000000",
    ]
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run(
            [*command, "--out", f"{folder}/out", "--json"], capture_output=True, text=True, check=False
        )
        answer = json.loads(run.stdout.splitlines()[-1])
        done = octavo.compress(minilm(), ratio=answer["limit"], preset="fast")
        return {"exit_code": run.returncode, "limit": answer["limit"], "reached": done.ratio}


_TIMED = """
import json, resource, sys, time
import torch, transformers, octavo, octavo.report, octavo.pipeline
preset, out = sys.argv[2], sys.argv[3]
started = time.perf_counter()
done = octavo.compress(sys.argv[1], ratio=8, preset=preset)
report = done.save(out, overwrite=True)
print(json.dumps({"seconds": time.perf_counter() - started, "steps": report["timings"], "quality_held_back": done.built.quality,
    "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""

_LOADED = """
import json, sys, time
import torch, transformers, octavo
tokens = torch.arange(16)[None]
times = []
for _ in range(6):
    started = time.perf_counter()
    model = transformers.AutoModel.from_pretrained(sys.argv[1])
    with torch.inference_mode():
        model(input_ids=tokens)
    times.append(time.perf_counter() - started)
print(json.dumps({"first": times[0], "warm": sorted(times[1:])[2]}))
"""


def _fresh(code: str, *words: str) -> dict[str, Any]:
    run = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    return dict(json.loads(run.stdout.splitlines()[-1]))


def times(work: Path) -> dict[str, Any]:
    """Wall time in fresh processes after imports, peak memory, loading, and entropy decoding."""
    result: dict[str, Any] = {
        preset: _fresh(_TIMED, str(minilm()), preset, str(work / f"timed-{preset}")) for preset in ("default", "fast")
    }
    # Alternating, so that the machine's load falls on both.
    loads: dict[str, list[dict[str, Any]]] = {"original": [], "artifact": []}
    for _ in range(3):
        loads["original"].append(_fresh(_LOADED, str(minilm())))
        loads["artifact"].append(_fresh(_LOADED, str(work / "timed-default")))
    result["load"] = {
        side: {key: sorted(run[key] for run in runs)[1] for key in ("first", "warm")} for side, runs in loads.items()
    }
    result["decode"] = _decoding(work / "timed-default")
    return result


def _decoding(folder: Path) -> dict[str, float]:
    """Weights per second of entropy decoding, all coded parts of an artifact, threads as loading uses them."""
    from concurrent.futures import ThreadPoolExecutor

    artifact = octavo.Artifact(folder)
    blobs = []
    for name, entry in artifact.sites.items():
        content = artifact.content(name)
        blobs += [content[part[0] : part[0] + part[1]] for part in entry["parts"].values() if len(part) == 2]
    blobs.sort(key=len, reverse=True)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            count = sum(tensor.numel() for tensor in pool.map(coding.decode, blobs))
        best = min(best, time.perf_counter() - started)
    return {"weights": count, "seconds": best, "weights_per_second": count / best}


def spearman(work: Path) -> dict[str, float] | None:
    """Spearman correlation on the STS benchmark's development set, of the original and at each ratio."""
    data = shared_data("stsb-dev.csv")
    if data is None:
        print("stsb-dev.csv is not there (OCTAVO_DATA): Spearman left out")
        return None
    result = {"original": octavo.evaluate(minilm(), data=data, metric="spearman").spearman}
    for ratio in RATIOS:
        result[str(ratio)] = octavo.evaluate(work / f"ratio-{ratio}", data=data, metric="spearman").spearman
    return result


def main() -> None:
    """Run the parts named on the command line, all by default, and add them to the results."""
    parts = sys.argv[1:] or ["times", "ratios", "gptq", "spearman", "unreachable"]
    calibration, test = brown()
    judge = Judge(test)
    results: dict[str, Any] = load_results("acceptance")
    results["data"] = "Brown corpus: 256 calibration sentences, 512 others for quality"
    work = CACHE / "acceptance"
    work.mkdir(parents=True, exist_ok=True)
    for part in parts:
        if part == "times":
            results[part] = times(work)
        elif part == "ratios":
            results[part], results["profile_times"] = ratios(judge, calibration, work)
        elif part == "gptq":
            results[part] = against_gptq(judge, calibration, work)
        elif part == "spearman":
            results[part] = spearman(work)
        else:
            results[part] = unreachable()
        print(part, json.dumps(results[part]), flush=True)
        save_results("acceptance", results)


if __name__ == "__main__":
    main()
