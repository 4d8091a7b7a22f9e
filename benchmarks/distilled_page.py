"""The part of docs/results.md on recovery by distillation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Table = Callable[[list[str], list[list[str]]], str]


def distilled(results: dict[str, Any], table: Table) -> str:
    """Every ratio with and without."""
    rows = []
    for row in results["rows"]:
        taught = f"{row['minutes']:.0f} min, {row['steps']:,} steps" if row["recover"] == "distill" else "-"
        rows.append(
            [
                row["model"], f"{row['ratio']:g}", "-" if row["ratio"] == 1 else f"{row['bytes'] / 1e6:.2f} MB", taught,
                f"{max(row['quality'], 0):.3g}", f"{row['spearman']:.4f}" if "spearman" in row else "-",
            ]
        )  # fmt: skip
    threads = {row["threads"] for row in results["rows"] if "threads" in row}
    return f"""## Recovery by distillation

The same ratio without and with `--recover distill` ([how](how-to/recover-by-distillation.md)). Unlabeled sentences of SST-2, STS-B's
training part and WikiText-2 teach; the plan without recovery is calibrated on the same file. Quality is 1 − cosine of the sentences of
STS-B's development part, and Spearman's correlation on it. Times are of {", ".join(map(str, sorted(threads)))} thread(s), beside other work.

{table(["model", "ratio", "artifact", "taught", "1 − cosine", "Spearman"], rows)}

Command: `{results["command"]}`, {results["created"]}.
"""


PARTS = {"distilled": distilled}
