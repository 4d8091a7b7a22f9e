"""MiniLM's table of tokens in five sizes: GroupReduce and one weighted SVD, both quantized, against quantization alone.

    python benchmarks/embedding.py

The table is 30,522 x 384. Calibration gives the evidence, from 256 sentences of the Brown corpus; all three methods get
the same. Every point is written as an artifact and read back, bytes are those of its files, and the table read replaces
the model's, of which nothing else is changed: quality is `1 - cosine` of sentence vectors on 256 other sentences. Where
GroupReduce has a choice of ranks, the one of least expected loss is taken, which the test sentences have no part in.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from common import brown, minilm, save_results
from torch import Tensor, nn

from octavo.calibration.calibrating import calibrate
from octavo.calibration.evidence import Evidence
from octavo.calibration.objective import Cosine
from octavo.forms import Form, RowBlocks
from octavo.methods.factorize import factors
from octavo.methods.factorize.grouping import grouped
from octavo.methods.factorize.groupreduce import quantized
from octavo.methods.quantize.entropy import Entropy
from octavo.recipes.frame import Lab, Stored, get_study, through_file
from octavo.sources.files import from_path
from octavo.sources.loading import load_weights
from octavo.sources.tokens import text_batches

#: Times smaller than the table in 32 bits.
RATIOS = (6, 9, 13, 19, 28)
#: Ranks of GroupReduce, as shares of the full one, at which its blocks are whole, and its blocks and rounds of
#: refinement.
SHARES, BLOCKS, ROUNDS = (1.0, 0.95, 0.85, 0.7, 0.5, 0.35), 8, 6

#: Makes a form at a number of bits.
Maker = Callable[[float], Form]


def makers(table: Tensor, evidence: Evidence) -> dict[str, list[tuple[dict[str, Any], Maker]]]:
    """For every method its choices, each by the setting that does not change with the size: forms by bits."""
    weighted = factors.factors(table, evidence)
    found: dict[str, list[tuple[dict[str, Any], Maker]]] = {
        "entropy": [({}, lambda bits: _entropy(table, evidence, bits))],
        "activation-svd": [({"rank": len(weighted.values)}, lambda bits: factors.quantized(weighted, bits, evidence))],
        "groupreduce": [],
    }
    for share in SHARES:
        rank = table.shape[1] if share == 1 else round(share / sum(1 / n for n in table.shape))
        grouping = grouped(table, evidence, rank, BLOCKS, ROUNDS)
        blocks = grouping.blocks(table, evidence)
        setting = {"rank": rank, "ranks": list(grouping.ranks), "rows": grouping.member.bincount().tolist()}
        found["groupreduce"].append(
            (setting, lambda bits, g=grouping, found=blocks: RowBlocks(g.member, quantized(found, bits)))
        )
    return found


def matched(table: Tensor, make: Maker, size: float) -> tuple[Stored, float]:
    """A table in a file of about ``size`` bytes, and its bits."""
    holder = nn.Embedding.from_pretrained(table)

    def at(bits: float) -> Stored:
        return through_file(holder, {"weight": make(bits)})

    bits, stored = Lab(get_study("groupreduce")).fit(at, round(size), 0.05, 16.0)
    return stored, bits


def _entropy(table: Tensor, evidence: Evidence, bits: float) -> Form:
    return Entropy().encode(table, Entropy(levels=(bits,)).settings(table, evidence)[0], evidence)


@torch.no_grad()
def main() -> None:
    """Measure every method at every size."""
    calibration, test = brown(test=256)
    source = from_path(minilm())
    load_weights(source)
    assert source.module is not None and source.folder is not None
    site = next(site for site in source.sites()[0] if site.name == "embeddings.word_embeddings.weight")
    with torch.enable_grad():
        evidence = calibrate(source, [site], text_batches(source.folder, calibration), Cosine()).evidence[site.name]
    words: Tensor = source.module.get_parameter(site.name)
    table = words.detach().clone()
    batches: list[Any] = text_batches(source.folder, test)
    reference = Cosine().reference(source.module, batches)
    choices = makers(table, evidence)
    points: list[dict[str, Any]] = []
    for ratio in RATIOS:
        size = 4 * table.numel() / ratio
        for method, offered in choices.items():
            began, best = time.perf_counter(), None
            for setting, make in offered:
                stored, bits = matched(table, make, size)
                restored = stored.tensors["weight"]
                loss = evidence.loss(table - restored)
                if best is None or loss < best[0]:
                    best = loss, stored.bytes, restored, {**setting, "bits": bits}
            assert best is not None
            loss, taken, restored, setting = best
            words.copy_(restored)
            errors = Cosine().measure(source.module, batches, reference)
            words.copy_(table)
            points.append({
                "method": method,
                "asked": ratio,
                "bytes": taken,
                "ratio": 4 * table.numel() / taken,
                "quality": float(errors.mean()),
                "standard_error": float(errors.std() / len(errors) ** 0.5),
                "expected_loss": loss,
                "setting": setting,
                "seconds": time.perf_counter() - began,
            })  # fmt: skip
            print(points[-1], flush=True)
            save_results("embedding", {
                "rows": site.rows,
                "columns": site.columns,
                "table_bytes": 4 * table.numel(),
                "metric": "1 - cosine",
                "calibration_sentences": len(calibration),
                "test_sentences": len(test),
                "points": points,
            })  # fmt: skip


if __name__ == "__main__":
    main()
