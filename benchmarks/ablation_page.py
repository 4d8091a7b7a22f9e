"""The table of docs/results/ablation.json, for benchmarks/pages.py."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

#: Every ingredient: whether the library has it in all encodings, and what was made of its figures.
VERDICTS: dict[str, tuple[bool, str]] = {
    "rate-aware rounding": (True, "in `entropy`"),
    "weights of outputs (gradients) beside those of inputs": (True, "in `entropy`"),
    "error feedback over columns": (True, "in `entropy`"),
    "classes of rows and columns in the coder": (True, "in the coder"),
    "token frequencies to the power 0": (True, "the power is 1/2"),
    "token frequencies to the power 1": (True, "the power is 1/2"),
    "trellis codes": (False, "method `trellis`, presets `default` and `best`; the allocator chooses by site"),
    "reconstruction of norms and biases": (False, "a step of its own, presets `default` and `best`, kept where held-out data say so"),
    "reconstruction with row gains": (False, "the same"),
    "incoherence rotation of inputs": (False, "left out"),
    "low-rank correction, rank 8": (False, "method `eora`, preset `best`; the allocator chooses by site"),
    "reconstruction points of levels ±1": (False, "left out"),
}  # fmt: skip


def curve_at(rows: list[dict[str, Any]], size: int, text: str) -> float:
    """Quality of the plain encoding at other bytes: linear between neighbours in the logarithm of both, beyond the ends too."""
    points = sorted({row["bytes"]: math.log(row[text]) for row in rows}.items())
    pairs = list(pairwise(points))
    if not pairs:
        return math.nan
    left, right = next((pair for pair in pairs if size <= pair[1][0]), pairs[-1])
    share = (math.log(size) - math.log(left[0])) / (math.log(right[0]) - math.log(left[0]))
    return math.exp(left[1] + share * (right[1] - left[1]))


def ablation(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table: with and without every ingredient at equal bytes, test text."""
    head = ["model", "ingredient", "artifact", "metric", "without", "with", "with / without", "verdict"]
    lines = []
    for model in results["models"].values():
        plain = model.get("plain", [])
        for name, (taken, verdict) in VERDICTS.items():
            for row in sorted(model.get(name, []), key=lambda row: row["bytes"]):
                pair = curve_at(plain, row["bytes"], "test"), row["test"]
                without, having = reversed(pair) if taken else pair
                lines.append(
                    [
                        model["title"], name, f"{row['bytes'] / 1e6:.2f} MB", model["metric"],
                        f"{without:.4g}", f"{having:.4g}", f"{having / without:.3f}", verdict,
                    ]
                )  # fmt: skip
    return head, lines


def unmeasured(results: dict[str, Any]) -> str:
    """Ingredients of which a model has no figure, model by model."""
    models = {name: results["models"].get(name, {}) for name in ("minilm", "smollm2")}
    tied = {"smollm2"}
    missing = {
        name: [part for part in VERDICTS if part not in model and not (name in tied and "frequencies" in part)]
        for name, model in models.items()
    }
    return "; ".join(f"{name}: {', '.join(parts)}" for name, parts in missing.items() if parts)
