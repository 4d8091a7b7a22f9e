"""The parts of docs/results.md on differences of fine-tunes, and on a federation through Flower."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

Table = Callable[[list[str], list[list[str]]], str]
#: Arms in the order of the table.
_ARMS = ("octavo", "ComPEFT", "low rank", "the tuned model itself")


def deltas(results: dict[str, Any], table: Table) -> str:
    """Scores of a task at every ratio, one column an arm."""
    parts = []
    for task in dict.fromkeys(row["task"] for row in results["rows"]):
        here = {(row["arm"], row["ratio"]): row for row in results["rows"] if row["task"] == task}
        whole, base = here["difference in 16 bits", 1], here["base", None]
        bits = here["one bit", None]
        ratios = sorted({ratio for arm, ratio in here if arm == "octavo"})
        rows = []
        for ratio in ratios:
            found = [here.get((arm, ratio)) for arm in _ARMS]
            cells = [
                "-" if row is None else "not reachable" if row["score"] is None else f"{row['score']:.2f}"
                for row in found
            ]
            size = here["octavo", ratio]["bytes"]
            rows.append([f"{ratio:g}", f"{size:,}" if size else "-", *cells])
        parts.append(
            f"{whole['metric']}: base {base['score']:.2f}, difference in 16 bits {whole['score']:.2f} "
            f"({whole['bytes']:,} bytes), one bit an entry {bits['score']:.2f} ({bits['bytes']:,} bytes).\n\n"
            + table(["ratio", "Octavo's bytes", *_ARMS], rows)
        )
    return f"""## Fine-tunes as differences

MiniLM is tuned on a task, and only the difference to the base is stored, in at most the bytes of the ratio to 16 bits. Every payload
is read back and added to the base. ComPEFT's scale and that of one bit are chosen on development data; low rank is quantized.

{(chr(10) * 2).join(parts)}

Command: `{results["command"]}`, {results["created"]}.
"""


def federated(results: dict[str, Any], table: Table) -> str:
    """Accuracy and bytes through Flower, beside the study's loop."""
    rows = []
    for arm in dict.fromkeys(row["arm"] for row in results["rows"]):
        here = [row for row in results["rows"] if row["arm"] == arm]
        mean = {
            name: statistics.fmean(row[name] for row in here) for name in ("accuracy", "study_accuracy", "study_bytes")
        }
        sent = f"{statistics.fmean(row['uplink'] for row in here):,.0f}" if "uplink" in here[0] else "-"
        rows.append(
            [
                arm,
                f"{len(here)}",
                f"{mean['accuracy']:.2f}",
                f"{mean['study_accuracy']:.2f}",
                sent,
                f"{mean['study_bytes']:,.0f}",
            ]
        )
    return f"""## FedZip through Flower

The federation of the study [`fedzip`](recipes/fedzip.md), with ten clients and classes dealt evenly, run by Flower's simulation. The study
has a loop of its own. Bytes are those of a client's reply after its first, which Flower counts with the names of records.

{table(["arm", "seeds", "accuracy (%)", "in the study", "uplink bytes", "in the study"], rows)}

Command: `{results["command"]}`, {results["created"]}.
"""


PARTS = {"deltas": deltas, "federated": federated}
