"""Pruning without quantizing: bytes of half the weights and of 2:4, exactly reloaded; then pruning against quantization.

    python benchmarks/pruning.py [alone] [families]

`alone` prunes MiniLM in float32, float16 and bfloat16 by `octavo compress`, each weight matrix by magnitude, and compares
the artifact's bytes with the weights file of the same precision. The artifact is read back and compared bit for bit with
the pruned source. `families` gives both families the same bytes: those that the pruned survivors take in a few bits.
Quality is measured on texts that neither calibration nor the choice of a plan saw. Writes docs/results/pruning.json.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import CACHE, brown, load_results, minilm, save_results, stat_bytes
from torch import Tensor

import octavo
from octavo.calibration.objective import Cosine
from octavo.sources.tokens import text_batches

CHOICES = {"50%": "magnitude:sparsity=0.5", "2:4": "magnitude:pattern=2:4"}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
#: Half of the weights pruned and survivors in so many bits says how many bytes both families get.
BITS = (3, 4, 6)


def pruned(weight: Tensor, choice: str) -> Tensor:
    """What magnitude pruning leaves of a matrix, by sorting."""
    size = weight.float().abs()
    if choice == "2:4":
        parts = size.view(len(size), -1, 4)
        kept = (parts.argsort(-1, descending=True, stable=True).argsort(-1) < 2).view(size.shape)
    else:
        first = size.flatten().argsort(descending=True, stable=True)[: size.numel() - round(size.numel() / 2)]
        kept = torch.zeros(size.numel(), dtype=torch.bool).index_fill(0, first, True).view(size.shape)
    return weight.where(kept, torch.zeros_like(weight))


def alone() -> list[dict[str, Any]]:
    """Both ways of pruning, in each precision."""
    from transformers import AutoModel

    rows = []
    for precision, dtype in DTYPES.items():
        with tempfile.TemporaryDirectory() as scratch:
            model = AutoModel.from_pretrained(minilm(), dtype=dtype)
            model.save_pretrained(Path(scratch) / "dense")
            dense, before = (Path(scratch) / "dense" / "model.safetensors").stat().st_size, model.state_dict()
            for name, choice in CHOICES.items():
                out = Path(scratch) / name.replace(":", "-")
                done = octavo.compress(Path(scratch) / "dense", ratio=1.6, keep={"*": choice}, preset="data-free")
                report = done.save(out)
                sites = [row.name for row in report.sites]
                after = AutoModel.from_pretrained(out, dtype=dtype).state_dict()
                rows.append({
                    "model": "minilm", "precision": precision, "pruned": name, "dense_bytes": dense, "bytes": stat_bytes(out),
                    "share": stat_bytes(out) / dense, "sites": len(sites),
                    "zeros": sum(int((after[n] == 0).sum()) for n in sites) / sum(after[n].numel() for n in sites),
                    "exact": all(torch.equal(after[n], pruned(before[n], name)) for n in sites),
                    "others_exact": all(torch.equal(after[n], before[n]) for n in before if n not in sites),
                })  # fmt: skip
                print(json.dumps(rows[-1]), flush=True)
    return rows


def families() -> list[dict[str, Any]]:
    """Pruning with quantized survivors, quantization alone, and both together at the same bytes."""
    from transformers import AutoModel

    calibration, test = brown()
    batches, objective = text_batches(minilm(), test), Cosine()
    reference, rows = objective.reference(AutoModel.from_pretrained(minilm()).eval(), batches), []

    def saved(folder: Path, **choices: Any) -> dict[str, Any]:
        """Bytes, quality on the test texts, and sites by family."""
        report = octavo.compress(minilm(), data=calibration, preset="fast", **choices).save(folder)
        value = objective.measure(AutoModel.from_pretrained(folder).eval(), batches, reference)
        won = {family: total.sites for family, total in report.families.items()}
        return {
            "bytes": stat_bytes(folder),
            "quality": float(value.mean()),
            "sites_won": won,
            "unused": report["unused"],
        }

    for bits in BITS:
        choice = f"sparsegpt:sparsity=0.5,bits={bits}"
        with tempfile.TemporaryDirectory() as scratch:
            given = saved(Path(scratch) / "given", ratio=2, keep={"*": choice})
            row = {"model": "minilm", "setting": choice, "budget": given["bytes"], "given": given}
            for name, methods in (("prune", ["prune"]), ("quantize", ["quantize"]), ("both", ["prune", "quantize"])):
                work = {"workspace": CACHE / "pruning" / name, "resume": True}
                row[name] = saved(Path(scratch) / name, size=given["bytes"], methods=methods, **work)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    """Measure what was asked for."""
    results = load_results("pruning")
    for name, measure in {"alone": alone, "families": families}.items():
        if name in (sys.argv[1:] or ["alone", "families"]):
            results[name] = measure()
            save_results("pruning", results)


if __name__ == "__main__":
    main()
