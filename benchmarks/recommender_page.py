"""The part of docs/results.md on a recommender, beside methods that train small tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Table = Callable[[list[str], list[list[str]]], str]
#: Table methods that are shown at a ratio, the best on development data first.
_SHOWN = 3


def recommender(results: dict[str, Any], table: Table) -> str:
    """Octavo and the best table methods at every ratio."""
    rows = [["float32", "1", f"{results['source_bytes']:,}", f"{results['auc']:.2f}", f"{results['lookup']:.2f}"]]
    for ratio in dict.fromkeys(row["ratio"] for row in results["rows"]):
        here = [row for row in results["rows"] if row["ratio"] == ratio]
        own = [row for row in here if row["tool"].startswith("octavo")]
        others = sorted((row for row in here if row not in own), key=lambda row: -row["chosen"])[:_SHOWN]
        rows += [
            [row["tool"], f"{ratio:g}", f"{row['bytes']:,}", f"{row['auc']:.2f}", f"{row['lookup']:.2f}"]
            for row in (*own, *others)
        ]
    return f"""## A recommender

A DeepFM on MovieLens-100k with a crossed field of user and genre. Octavo compresses the trained model. The table methods train
from the start as they are stored, with a perceptron of as many bits as Octavo's, in the same bytes. The {_SHOWN} best of them on
development data are shown. Lookups are of 256 random rows of the largest table, in its stored form.

{table(["tool", "ratio", "bytes", "test AUC (%)", "microseconds a row"], rows)}

Command: `{results["command"]}`, {results["created"]}.
"""


PARTS = {"recommender": recommender}
