"""The part of docs/results.md on the distance of quantizers to the rate-distortion bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Table = Callable[[list[str], list[list[str]]], str]
#: Rates of the table; a quantizer's nearest point is shown if it is this near.
_RATES, _NEAR = (1.0, 1.5, 2.0, 3.0, 4.0), 0.3


def rate_distortion(results: dict[str, Any], table: Table) -> str:
    """Bits over the bound at every rate, by source."""
    parts = []
    for source in dict.fromkeys(curve["source"] for curve in results["curves"]):
        curves = [curve for curve in results["curves"] if curve["source"] == source]
        rows = []
        for curve in curves:
            cells = []
            for rate in _RATES:
                point = min(curve["points"], key=lambda point: abs(point["rate"] - rate))
                near = abs(point["rate"] - rate) < _NEAR
                cells.append(f"{point['bits_over']:.3f} ({point['decibels_over']:.2f} dB)" if near else "-")
            speeds = [
                f"{min(p[key] for p in curve['points']):.0f} to {max(p[key] for p in curve['points']):.0f}"
                for key in ("encode", "decode")
            ]
            rows.append([curve["quantizer"], *cells, *speeds])
        head = ["quantizer", *(f"{rate:g} bits" for rate in _RATES), "encode", "decode"]
        title = curves[0]["title"]
        parts.append(f"### {title.capitalize() if title == source else title}\n\n{table(head, rows)}\n")
    sources = "\n".join(parts)
    return f"""## Distance to the rate-distortion bound

Bits a weight that a quantizer takes beyond the least that any could, for the squared error that it makes; in brackets, the same as
decibels of error. All bytes of the stored form count. The bound is that of independent weights with known sizes of rows, so real
weights, which have more structure, may come closer. `small-floats`, `e8` and `vector-codes` are methods like the others. Speeds are
in million weights a second on one core, beside other work.

{sources}
Command: `{results["command"]}`, {results["created"]}.
"""


def low_bits(results: dict[str, Any], table: Table) -> str:
    """Plans of under two bits a weight."""
    rows = [
        [
            f"{row['ratio']:g}", row["plan"], f"{row['bytes'] / 1e6:.2f} MB", f"{row['bits_per_weight']:.2f}",
            f"{row['kl']:.3g}", f"{row['perplexity']:.4g}", str(row["codebook_sites"]),
        ]
        for row in results["rows"]
    ]  # fmt: skip
    return f"""## Under two bits a weight

{results["rows"][0]["model"]}, calibrated and judged as in [the comparison with other tools](bench.md). `codebooks` is the default preset with
the learned codebooks of `jlcm` among its methods; the last column says at how many sites they were chosen.

{table(["ratio to float32", "plan", "artifact", "bits/weight", "mean KL", "perplexity", "sites with learned codebooks"], rows)}

Command: `{results["command"]}`, {results["created"]}.
"""


PARTS = {"rate-distortion": rate_distortion, "low-bits": low_bits}
