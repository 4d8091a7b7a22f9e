"""Make docs/results.md, docs/bench.md and the plots from docs/results/*.json. Run after the benchmarks."""

from __future__ import annotations

import json
from typing import Any

import bench_page
import fast_page
import front_plot
import llama_page
import robustness_page
from ablation_page import ablation, unmeasured
from common import RESULTS
from cut_page import PARTS as CUT_PARTS
from distilled_page import PARTS as DISTILLED_PARTS
from factor_pages import PARTS as FACTOR_PARTS
from flow_pages import PARTS as FLOW_PARTS
from pruning_page import PARTS as PRUNING_PARTS
from rate_page import PARTS as RATE_PARTS
from recommender_page import PARTS as TABLE_PARTS
from size_pages import PARTS

from octavo.system.atomic import write_file

DOCS = RESULTS.parent


def table(head: list[str], rows: list[list[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def megabytes(size: int) -> str:
    """Decimal megabytes."""
    return f"{size / 1e6:.2f} MB"


def ratio_rows(results: dict[str, Any]) -> list[list[str]]:
    """One row per ratio."""
    spearman = results.get("spearman") or {}
    rows = []
    for row in results["ratios"]:
        families = row["families"].values()
        best = min((family["quality"] for family in families), default=float("nan"))
        uniform = row["uniform"] if row["uniform"] is not None else row["quality"]
        rows.append(
            [
                f"{row['ratio']}", megabytes(row["bytes"]), f"{row['used']:.2%}", f"{row['quality']:.2g}", f"{uniform:.2g}",
                f"{best:.2g}", f"{spearman[str(row['ratio'])]:.4f}" if str(row["ratio"]) in spearman else "-",
            ]
        )  # fmt: skip
    return rows


def acceptance(results: dict[str, Any]) -> str:
    """The page of MiniLM's results."""
    times, load = results["times"], results["times"]["load"]
    spearman = results.get("spearman") or {}
    gptq = [
        [
            row["rival"], megabytes(row["rival_bytes"]), megabytes(row["rival_bytes_uncoded"]), f"{row['rival_quality']:.4f}",
            f"{row['quality']:.4f}", f"{row['share']:.2f}", f"{row['at_most']:.2f}",
        ]
        for row in results["gptq"]
    ]  # fmt: skip
    timing = [
        ["ratio 8, preset `default`, after imports", f"{times['default']['seconds']:.0f} s"],
        ["ratio 8, preset `fast`, after imports", f"{times['fast']['seconds']:.0f} s"],
        ["peak memory, `default`", f"{times['default']['peak_memory'] / 1e9:.2f} GB"],
        [
            "a new ratio planned from a saved profile",
            f"{max(r['plan_seconds'] for r in results['ratios']):.2f} s at most",
        ],
        [
            "… written, verified and reported, with the rivals",
            f"{min(r['write_seconds'] for r in results['ratios']):.0f} to {max(r['write_seconds'] for r in results['ratios']):.0f} s",
        ],
        ["load and first output, fresh process: original", f"{load['original']['first']:.2f} s"],
        ["load and first output, fresh process: artifact", f"{load['artifact']['first']:.2f} s"],
        ["load and output, again in the same process: original", f"{load['original']['warm'] * 1e3:.0f} ms"],
        ["load and output, again in the same process: artifact", f"{load['artifact']['warm'] * 1e3:.0f} ms"],
        ["entropy decoding, 2 threads", f"{times['decode']['weights_per_second'] / 1e6:.0f} million weights/s"],
    ]
    machine = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    versions = ", ".join(f"{key} {value}" for key, value in results["versions"].items())
    original = f" Spearman of the original: {spearman['original']:.4f}." if spearman else ""
    return f"""## all-MiniLM-L6-v2, 90.86 MB

{results["data"]}. The measure is mean 1 − cosine of sentence vectors. The bytes are those of the whole model, embedding included. Spearman's correlation is that on
the development set of the STS benchmark.{original}

{table(["ratio asked", "artifact", "share of the budget", "1 − cosine", "best uniform", "best single family", "Spearman"], ratio_rows(results))}

The best uniform plan and the best plan of a single family are built in the same bytes. They are measured on the same test sentences. The
choice between them is made on held-out calibration data, so one of them may be slightly better on the test data. Norms, biases and row gains
are fitted afterwards, for the winner only. That step gains 2 to 3% here (see the ablation).

The next table compares with GPTQ with groups of 64, in the bytes of the rival's artifact. The rival's embeddings are rounded to the same bits, and its
calibration text is the same. Octavo entropy-codes the codes of the rival, so its artifact is smaller than elsewhere ("uncoded").

{table(["rival", "its artifact", "uncoded", "its 1 − cosine", "Octavo's", "share", "promised"], gptq)}

{table(["what", "measured"], timing)}

A ratio of 1,000,000 is refused with exit code {results["unreachable"]["exit_code"]}. The error names the limit {results["unreachable"]["limit"]:g}. Asked for that limit, Octavo reaches {results["unreachable"]["reached"]:.2f}.

Command: `{results["command"]}`, {results["created"]}. {machine}. {versions}.
"""


def digits(results: dict[str, Any]) -> str:
    """The page of the other sources."""
    rows = [
        [
            row["source"], f"{row['ratio']}", f"{row['bytes']:,}", f"{row['used']:.2%}",
            f"{row['accuracy']:.4f}" if "accuracy" in row else "-", f"{row['accuracy_before']:.4f}" if "accuracy_before" in row else "-",
        ]
        for row in results["rows"]
    ]  # fmt: skip
    return f"""## Other sources

{results["data"]}. A *bare* source is a safetensors file without code or data.

{table(["source", "ratio asked", "bytes", "share of the budget", "accuracy", "accuracy before"], rows)}

Command: `{results["command"]}`, {results["created"]}.
"""


def ingredients(results: dict[str, Any]) -> str:
    """What each ingredient gains."""
    return f"""## Ablation

Every site is encoded by `entropy`, with one step for the whole model. Each row changes one ingredient of it. Both sides have the same artifact bytes: the plain
encoding was measured at several steps, and interpolated in the logarithms of bytes and loss. Nothing was chosen on the test text. The size of these
artifacts was computed; they were not written. So the figures compare ingredients, and are not results of `octavo compress`.

{table(*ablation(results))}

Not measured yet: {unmeasured(results) or "nothing"}.

Command: `{results["command"]}`, {results["created"]}.
"""


def main() -> None:
    """Write all pages."""
    read = lambda name: json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))  # noqa: E731
    results = read("acceptance")
    page = "# Results\n\n`benchmarks/pages.py` makes this page from `docs/results/*.json`. Every figure was measured on an artifact that was read back from disk.\n\n"
    parts = [acceptance(results), digits(read("digits")), ingredients(read("ablation"))]
    parts += [
        part(read(name), table)
        for name, part in (
            PARTS | FACTOR_PARTS | PRUNING_PARTS | CUT_PARTS | RATE_PARTS | DISTILLED_PARTS | TABLE_PARTS | FLOW_PARTS
        ).items()
        if (RESULTS / f"{name}.json").exists()
    ]
    write_file(DOCS / "results.md", (page + "\n".join(parts)).encode())
    bench_page.write(table)
    fast_page.write(table)
    front_plot.write()
    llama_page.write(table)
    robustness_page.write()


if __name__ == "__main__":
    main()
