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


PARTS = {"cut-speed": cut_speed}
