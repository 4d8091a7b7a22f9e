"""docs/explanation/where-time-goes.md, from docs/results/fast.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from common import RESULTS
from size_pages import source_of

from octavo.system.atomic import write_file

Table = Callable[[list[str], list[list[str]]], str]

_STAGES = ("open", "evidence", "profile", "plan", "encode", "reconstruct", "verify", "measure")
_LOADS = ("original", "original, touched", "artifact", "octavo.load, touched", "decoding alone")
_TEXT = """## What each stage does

| stage | what takes its time |
| --- | --- |
| open | importing the model's code, reading and hashing the source |
| evidence | one forward and one backward pass over the calibration text, and the moments of every layer's inputs |
| profile | rounding a few sites of every kind at all settings, the others at those within reach of the budget, and coding each result to count its bytes; from `default` on also measured plans that correct expected losses |
| encode | encoding the plan and its rivals in full until the budget is met, and measuring each on held-out text |
| reconstruct | fitting norms, biases and row gains (not with `fast`); a third of it where that does not help |
| verify | writing, reading back, comparing, and measuring the artifact that was loaded |
| measure | latencies, the report |

## What `fast` leaves out

- The plain method is no rival, since this preset does not try it at any site.
- Layers of models of `transformers` multiply in bfloat16 during calibration, where the hardware does that natively.
  Moments are still summed in float32, and losses are measured in float32.
- A mixed plan is built only if it expects to lose 5% less than the best uniform plan. The uniform plan is built only if
  it expects to lose at most twice as much as the mixed one; otherwise a note says what was expected.
- Tensors that are not weights keep the relative precision of each value. Nothing is measured to store them more narrowly.

## What is left to gain when loading

A mapped original that nobody touches is not read. So its time is that of making the module. An artifact is decoded, in
parallel by site, and its weights are written to new memory in the model's dtype.

- Decoding is entropy coding, putting streams back in the order of the matrix, and multiplying with steps. Row gains are
  multiplied in place.
- Writing float32 weights into new memory is left. A copy of the original has to do the same.
- Decoding lazily, site by site at first use, would only move the time to the first output, which needs every site but
  rows of a table. To run without decoded weights there is `octavo.load(path, packed=True)`.
"""


def _row(row: dict[str, Any], side: str) -> list[str]:
    found = row[side]
    stages = [f"{found['stages'].get(name, 0.0):.1f}" for name in _STAGES]
    return [row["model"], row["preset"], side, f"{found['seconds_per_100m']:.0f}", f"{found['seconds']:.1f}", *stages]


def page(results: dict[str, Any], table: Table) -> str:
    """The page."""
    pairs = [(row, side) for row in results["rows"] for side in ("before", "after") if side in row]
    wall = [_row(row, side) for row, side in pairs]
    used = [
        [
            row["model"], row["preset"], side, f"{row[side]['processor_seconds']:.1f}",
            *(f"{row[side]['processor_stages'].get(name, 0.0):.1f}" for name in _STAGES),
            f"{row[side]['bytes']:,}", f"{row[side]['quality_held_back']:.5g}",
        ]
        for row, side in pairs
    ]  # fmt: skip
    loads = [
        [row["model"], row["preset"], side, *(f"{1e3 * row[side]['load'][name]:.0f}" for name in _LOADS)]
        for row, side in pairs
    ]
    who = ["model", "preset", "version"]
    return f"""# Where the time goes

`benchmarks/fast_page.py` makes this page from `docs/results/fast.json`. Each run is a process of its own at ratio {results["ratio"]}, with the
built-in text. It has opened the original once, so what libraries import, one to three seconds, does not count. Before and
after alternate in one run of the benchmark.

Seconds by the clock, and per 100 million weights:

{table([*who, "s per 10⁸", "s", *_STAGES], wall)}

Processor seconds of all threads, which other load disturbs less, and what came out:

{table([*who, "s", *_STAGES, "bytes", "loss on held-out text"], used)}

`fast` reads 96 texts where the version before read 128, and holds out 24 of them in place of 32. So its losses before
and after are on different texts. On the same texts it loses more now: [decisions](../decisions.md) has the figures.

Milliseconds of a second load in one process:

{table([*who, *_LOADS], loads)}

{_TEXT}
{source_of(results)}"""


def write(table: Table) -> None:
    """Write the page, if there are results."""
    file = RESULTS / "fast.json"
    if file.exists():
        text = page(json.loads(file.read_text(encoding="utf-8")), table)
        write_file(RESULTS.parent / "explanation" / "where-time-goes.md", text.encode())
