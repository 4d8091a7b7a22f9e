"""Pruning without quantizing: bytes of half the weights and of 2:4, exactly reloaded; then pruning against quantization.

    python benchmarks/pruning.py

MiniLM in three precisions is pruned by `octavo compress`, all weight matrices by magnitude, and the artifact's bytes are
compared with those of the weights file of the same precision. The artifact is read back and compared bit for bit with
the pruned source. Then pruning and quantization get the same bytes: those that half of the weights take in a few bits.
Quality is measured on texts that neither calibration nor the choice of a plan saw. Writes docs/results/pruning.json, and
measures only rows that are not in it yet.
"""

from __future__ import annotations

import json
import tempfile
from itertools import product
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
        kept = (parts.argsort(dim=-1, descending=True, stable=True).argsort(-1) < 2).view(size.shape)
    else:
        first = size.flatten().argsort(descending=True, stable=True)[: size.numel() - round(size.numel() / 2)]
        kept = torch.zeros(size.numel(), dtype=torch.bool).index_fill(0, first, True).view(size.shape)
    return weight.where(kept, torch.zeros_like(weight))


def alone(precision: str, name: str) -> dict[str, Any]:
    """One way of pruning, and nothing else."""
    from transformers import AutoModel

    dtype = DTYPES[precision]
    with tempfile.TemporaryDirectory() as scratch:
        source, out = Path(scratch) / "dense", Path(scratch) / "pruned"
        model = AutoModel.from_pretrained(minilm(), dtype=dtype)
        model.save_pretrained(source)
        dense, before = (source / "model.safetensors").stat().st_size, model.state_dict()
        report = octavo.compress(source, ratio=1.6, keep={"*": CHOICES[name]}, preset="data-free").save(out)
        after, sites = AutoModel.from_pretrained(out, dtype=dtype).state_dict(), [row.name for row in report.sites]
        others = [n for n in before if n not in sites and before[n].is_floating_point()]
        return {
            "precision": precision, "pruned": name, "dense_bytes": dense, "bytes": stat_bytes(out),
            "share": stat_bytes(out) / dense, "sites": len(sites),
            "zeros": sum(int((after[n] == 0).sum()) for n in sites) / sum(after[n].numel() for n in sites),
            "exact": all(torch.equal(after[n], pruned(before[n], name)) for n in sites),
            # Norms and biases are stored in 16 bits where these keep their precision.
            "others_moved": max(float((after[n].float() - before[n].float()).abs().max()) for n in others),
        }  # fmt: skip


def families(bits: int) -> dict[str, Any]:
    """Pruning with quantized survivors, quantization alone, and both together at the same bytes."""
    from transformers import AutoModel

    calibration, test = brown()
    batches, objective = text_batches(minilm(), test), Cosine()
    reference = objective.reference(AutoModel.from_pretrained(minilm()).eval(), batches)

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

    with tempfile.TemporaryDirectory() as scratch:
        choice = f"sparsegpt:sparsity=0.5,bits={bits}"
        given = saved(Path(scratch) / "given", ratio=2, keep={"*": choice})
        row = {"setting": choice, "bits": bits, "budget": given["bytes"], "given": given}
        for name, methods in (("prune", ["prune"]), ("quantize", ["quantize"]), ("both", ["prune", "quantize"])):
            work = {"workspace": CACHE / "pruning" / name, "resume": True}
            row[name] = saved(Path(scratch) / name, size=given["bytes"], methods=methods, **work)
    return row


def main() -> None:
    """Measure every row that is not there yet."""
    results = {"alone": [], "families": [], **load_results("pruning")}
    kept = {(row["precision"], row["pruned"]) for row in results["alone"]}
    wanted = [(alone, "alone", key) for key in product(DTYPES, CHOICES) if key not in kept]
    wanted += [(families, "families", (n,)) for n in BITS if n not in {row["bits"] for row in results["families"]}]
    for measure, part, key in wanted:
        results[part].append(measure(*key))
        print(json.dumps(results[part][-1]), flush=True)
        save_results("pruning", results)


if __name__ == "__main__":
    main()
