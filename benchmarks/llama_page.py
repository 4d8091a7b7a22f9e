"""docs/llama-cpp.md and its plot, from docs/results/gguf-*.json. `python benchmarks/llama_page.py`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from common import RESULTS
from front_plot import Axes, drawing
from size_pages import source_of

from octavo.system.atomic import write_file

Table = Callable[[list[str], list[list[str]]], str]
#: In the order of the page.
_MODELS = ("decoder", "smollm2", "gemma")
_PLOT = "gguf-by-size.svg"
_HEAD = """# Beside llama.cpp's own mixes

`benchmarks/llama_page.py` makes this page from `docs/results/gguf-*.json`, which `benchmarks/llama_files.py` writes. [How to
make such a file](how-to/run-in-llama-cpp.md).

For each mix of `llama-quantize`, with an importance matrix, Octavo made a file of at most as many bytes (`--for gguf`).
The importance matrix and Octavo's moments are of the same text. `llama-perplexity` measured both files on other text:
their divergence from the source in nats a token, and their perplexity. `llama-bench` measured generation, in turn.
A share of 0.5 is half the divergence. A speed of 1.1 is 1.1 times the tokens a second.
"""


def _tables(results: dict[str, Any], table: Table) -> str:
    rows = [
        [
            row["mix"], f"{row['llama.cpp']['bytes'] / 1e6:.2f}", f"{row['octavo']['bytes'] / 1e6:.2f}",
            f"{row['llama.cpp']['divergence']:.5f}", f"{max(row['octavo']['divergence'], 0.0) + 0.0:.5f}",
            "-" if row["share"] is None else f"{max(row['share'], 0.0) + 0.0:.3f}",
            f"{row['llama.cpp']['perplexity']:.2f}", f"{row['octavo']['perplexity']:.2f}", f"{row['speed']:.2f}",
        ]
        for row in results["rows"]
    ]  # fmt: skip
    head = ["mix", "MB", "Octavo's MB", "divergence", "Octavo's", "share", "perplexity", "Octavo's", "speed"]
    source = results["source"]
    earlier = (
        "" if "seen" not in results else "\nThese rows are of an earlier sample of text, which the command names.\n"
    )
    exact = [row["mix"] for row in results["rows"] if row["octavo"]["divergence"] <= 0]
    if exact:
        earlier += (
            f"\nAt the size of {exact[0]} all weights of the source fit without loss, and so they do at larger ones.\n"
        )
    return (
        f"## {results['model']}\n\nSource: {source['bytes'] / 1e6:.2f} MB, perplexity {source['perplexity']:.2f}. Preset "
        f"`{results['preset']}`, windows of {results['context']} tokens.\n\n{table(head, rows)}\n{earlier}\n{source_of(results)}\n"
    )


def _axes(results: dict[str, Any]) -> Axes:
    """Ends that hold all points."""
    points = [row[tool] for row in results["rows"] for tool in ("llama.cpp", "octavo")]
    sizes = [point["bytes"] / 1e6 for point in points]
    losses = [point["divergence"] for point in points if point["divergence"] > 0]
    ticks = tuple(float(f"{min(sizes) * (max(sizes) / min(sizes)) ** (place / 3):.2g}") for place in range(4))
    low = 10.0 ** (len(str(int(1 / min(losses)))) * -1)
    return (0.93 * min(sizes), 1.07 * max(sizes)), (low, 1.0), ticks, "KL to the source"


def write(table: Table) -> None:
    """Write the page and the plot of the models that were measured."""
    found = {
        name: json.loads(file.read_text(encoding="utf-8"))
        for name in _MODELS
        if (file := RESULTS / f"gguf-{name}.json").exists()
    }
    rows = [
        {"model": name, "tool": key, "setting": row["mix"], "bytes": row[tool]["bytes"], "quality": max(row[tool]["divergence"], 0.0)}
        for name, results in found.items()
        for row in results["rows"]
        for key, tool in (("octavo", "octavo"), ("llama_cpp", "llama.cpp"))
    ]  # fmt: skip
    shown = list(found)[:2]
    picture = drawing(
        rows, {name: _axes(found[name]) for name in shown}, {name: found[name]["model"] for name in shown}
    )
    write_file(RESULTS / _PLOT, picture.encode())
    parts = [
        _HEAD,
        f"![Bytes against divergence](results/{_PLOT})\n",
        *(_tables(results, table) for results in found.values()),
    ]
    write_file(RESULTS.parent / "llama-cpp.md", "\n".join(parts).encode())
