"""The part of docs/results.md about pruning: bytes of pruning alone, and both families at equal bytes."""

from __future__ import annotations

from size_pages import Results, Table, source_of


def pruning(results: Results, table: Table) -> str:
    """Shares of the dense bytes, and quality in equal bytes."""
    exact = lambda row: "bit for bit" if row["exact"] else "no"  # noqa: E731
    alone = [
        [
            row["precision"],
            row["pruned"],
            f"{row['dense_bytes']:,}",
            f"{row['bytes']:,}",
            f"{row['share']:.3f}",
            exact(row),
        ]
        for row in results["alone"]
    ]
    cell = lambda found: f"{found['quality']:.3g}"  # noqa: E731
    equal = [
        [
            f"`{row['setting']}`", f"{row['budget']:,}", *(cell(row[name]) for name in ("given", "prune", "quantize", "both")),
            ", ".join(f"{family} {sites}" for family, sites in row["both"]["sites_won"].items()),
        ]
        for row in results["families"]
    ]  # fmt: skip
    head = [
        "budget: bytes of",
        "bytes",
        "that one setting",
        "pruning alone",
        "quantization alone",
        "both families",
        "sites won",
    ]
    both = f"""With quantized survivors, pruning and quantization get the same bytes: those of half the weights at a few bits each (preset `fast`). The figures are 1 − cosine on
texts that were used neither for calibration nor for the choice of a plan; lower is better. *Both families* lets the allocator choose site by site.

{table(head, equal)}

"""
    return f"""## Pruning without quantizing

All weight matrices of MiniLM are pruned by magnitude, embeddings included, and no survivor is rounded. The share is that of the weights file of the same precision.
Norms and biases are stored in 16 bits where these keep their precision, as always.

{table(["precision", "pruned", "dense bytes", "bytes", "share", "weights reloaded"], alone)}

{both if equal else ""}{source_of(results)}"""


PARTS = {"pruning": pruning}
