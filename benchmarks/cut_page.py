"""The part of docs/results.md on cuts: what half of the heads and neurons cost, and what speed that gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Table = Callable[[list[str], list[list[str]]], str]


def cut_speed(results: dict[str, Any], table: Table) -> str:
    """Scores, speeds, and the taught model."""
    scores = [
        [row["score"], "yes" if row["compensate"] else "no", f"{row['cosine']:.3f}", f"{row['seconds']:.0f} s"]
        for row in results["scores"]
    ]
    first = results["scores"][0]
    speeds = [["cut", str(row["batch"]), f"{row['cut']['speedup']:.2f}"] for row in results["speed"]]
    told = f"One thread on sentences of {results['tokens']} tokens; both took turns."
    if "quick" in results:
        speeds += [
            ["cut, taught, `--for speed`", size, f"{row['speedup']:.2f}"]
            for size, row in results["quick"]["speed"].items()
        ]
        told += f" The last is a file for onnxruntime, of cosine {results['quick']['cosine']:.3f}."
    taught = ""
    if (found := results.get("recovered")) is not None:
        taught = (
            f"The source then taught the first for {found['minutes']:.0f} minutes ({found['steps']:,} steps, one thread "
            f"beside other work): cosine {first['cosine']:.3f} became {found['cosine']:.3f}.\n\n"
        )
    return f"""## Half of the heads and neurons

A [cut](how-to/cut-a-model.md) of all-MiniLM-L6-v2 to {first["linear"]:.0%} of the weights of its linear layers. The cosine is that of
512 Brown sentences to the source's vectors, without any training.

{table(["score", "compensated", "cosine", "time"], scores)}

{taught}How many times as fast as the dense model in PyTorch. {told}

{table(["model", "batch", "speed"], speeds)}

Command: `{results["command"]}`, {results["created"]}.
"""


def cut_photos(results: dict[str, Any], table: Table) -> str:
    """Scores, the taught net, and speeds."""
    rows = [
        [row["score"], "yes" if row["compensate"] else "no", f"{row['agreement']:.1%}", f"{row['kl']:.3g}"]
        for row in results["rows"]
    ]
    if (found := results.get("taught")) is not None:
        told = f"{found['score']}, taught for {found['minutes']:.0f} minutes"
        rows.append([told, "-", f"{found['agreement']:.1%}", f"{found['kl']:.3g}"])
    speeds = ", ".join(f"{row['speedup']:.2f} at batch {size}" for size, row in results["speed"].items())
    return f"""## Channels of EfficientNet-Lite0

Channels cut to {results["share"]:.0%} of the multiply-adds. Agreement is that of the most likely class with the source's, on
{results["photographs"]} crops of photographs that the cut never saw.

{table(["score", "compensated", "agreement", "KL"], rows)}

The first is so many times as fast as the source in PyTorch, with {results["threads"]} thread(s): {speeds}.

Command: `{results["command"]}`, {results["created"]}.
"""


def cut_plans(results: dict[str, Any], table: Table) -> str:
    """Every ratio with the cut among the methods and without."""
    rows = [
        [
            f"{row['ratio']:g}", "yes" if row["cut"] else "no", f"{row['kept']:.0%}" if "kept" in row else "-",
            f"{row['minutes']:.0f} min" if "minutes" in row else "-", f"{row['bytes']:,}", f"{row['quality']:.4g}",
        ]
        for row in results["rows"]
    ]  # fmt: skip
    return f"""## A cut among the methods

all-MiniLM-L6-v2 with heads and neurons among what may be given up, and without. Levels of the cut are compared on held-out data
before anything is taught. Where no level is kept, both plans are one.

{table(["ratio", "cut tried", "kept", "taught", "bytes", "1 − cosine"], rows)}

Command: `{results["command"]}`, {results["created"]}.
"""


PARTS = {"cut-speed": cut_speed, "cut-photos": cut_photos, "cut-plans": cut_plans}
