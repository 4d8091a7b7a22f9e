"""Make docs/bench.md and its plots from docs/results/bench.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common import RESULTS
from models import TITLES

from octavo.system.atomic import write_file

DOCS = RESULTS.parent
Row = dict[str, Any]

#: Quality that is lost in the rounding of sums: nothing to compare with.
LOSSLESS = 1e-6
#: How the tools are called by those who make them.
NAMES = {
    "octavo": "Octavo", "own": "plain", "torchao": "torchao", "quanto": "optimum-quanto", "hqq": "HQQ", "nncf": "NNCF + OpenVINO",
    "llmcompressor": "llm-compressor", "gptqmodel": "GPTQModel", "auto_round": "AutoRound", "llama_cpp": "llama.cpp",
}  # fmt: skip


def front(rows: list[Row]) -> list[Row]:
    """Rows that no other beats in both bytes and quality, by falling size."""
    best, kept = float("inf"), []
    for row in sorted(rows, key=lambda row: (row["bytes"], row["quality"])):
        if row["quality"] < best:
            best = row["quality"]
            kept.append(row)
    return kept[::-1]


def named(row: Row) -> str:
    """Tool and setting."""
    return f"{NAMES[row['tool']]} {row['setting']}"


def figure(value: float | None, form: str = ".3g") -> str:
    """A number, or a dash."""
    return "-" if value is None else f"{value:{form}}"


def against(rows: list[Row], full: int) -> list[list[str]]:
    """Every point on the other tools' front, and Octavo's best in at most its bytes."""
    ours = [row for row in rows if row["tool"] == "octavo"]
    lines = []
    for row in front([row for row in rows if row["tool"] != "octavo"]):
        within = [own for own in ours if own["bytes"] <= row["bytes"]]
        line = [f"{full / row['bytes']:.1f}", named(row), f"{row['bytes'] / 1e6:.2f} MB", figure(row["quality"], ".2g")]
        if within:
            best = min(within, key=lambda own: own["quality"])
            share = f"{best['quality'] / row['quality']:.2f}" if row["quality"] > LOSSLESS else "nothing lost by either"
            line += [f"{best['bytes'] / 1e6:.2f} MB", figure(best["quality"], ".2g"), share]
        else:
            line += ["-", "-", "-"]
        lines.append(line)
    return lines


HEAD = ["ratio", "best other tool", "bytes", "quality", "Octavo's bytes", "Octavo's quality", "share"]


def plot(rows: list[Row], model: str, file: Path) -> None:
    """Bytes against quality: every row, the front of the others, and Octavo's line."""
    import matplotlib

    matplotlib.use("svg")
    # Made twice from the same rows, the file is the same.
    matplotlib.rcParams.update({"svg.hashsalt": "octavo", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})  # fmt: skip
    from matplotlib import pyplot

    canvas, axes = pyplot.subplots(figsize=(8, 5))
    others = sorted({row["tool"] for row in rows} - {"octavo"})
    for number, tool in enumerate(others):
        mine = [row for row in rows if row["tool"] == tool]
        axes.scatter([row["bytes"] / 1e6 for row in mine], [row["quality"] for row in mine], s=16, alpha=0.75, marker="osD^vP*Xh"[number % 9], color=f"C{number}", label=NAMES[tool])  # fmt: skip
    edge = front([row for row in rows if row["tool"] != "octavo"])
    axes.step([row["bytes"] / 1e6 for row in edge], [row["quality"] for row in edge], where="pre", color="0.5", linewidth=1, label="best of the others")  # fmt: skip
    ours = sorted((row for row in rows if row["tool"] == "octavo"), key=lambda row: row["bytes"])
    if ours:
        axes.plot([row["bytes"] / 1e6 for row in ours], [row["quality"] for row in ours], color="black", marker="o", markersize=5, linewidth=2, label="Octavo")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="MB, whole model", ylabel=f"{rows[0]['metric']} to the original", title=TITLES[model])  # fmt: skip
    ticks = [size for size in (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512) if min(row["bytes"] for row in rows) / 1.1e6 < size < max(row["bytes"] for row in rows) / 0.9e6]  # fmt: skip
    axes.set_xticks(ticks, [str(size) for size in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    canvas.savefig(file, metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(canvas)


def section(rows: list[Row], model: str, table: Any) -> str:
    """One model's part of the page."""
    good = [row for row in rows if row["quality"] is not None]
    plot(good, model, RESULTS / f"bench-{model}.svg")
    full = round(good[0]["bytes"] * 32 / good[0]["bits_per_weight"])
    second = [] if good[0]["second_metric"] is None else [good[0]["second_metric"]]
    head = ["tool", "version", "setting", "MB", "ratio", "bits/weight", good[0]["metric"], *second, "s", "GB", "latency"]  # fmt: skip
    every = [
        [
            NAMES[row["tool"]], row["version"], row["setting"], f"{row['bytes'] / 1e6:.2f}", f"{full / row['bytes']:.2f}",
            f"{row['bits_per_weight']:.2f}", figure(row["quality"]), *([figure(row["second"])] if second else []),
            figure(row["seconds"], ".0f"), figure(row["peak_memory"] and row["peak_memory"] / 1e9, ".1f"), figure(row["latency"], ".2f"),
        ]
        for row in sorted(good, key=lambda row: -row["bytes"])
    ]  # fmt: skip
    return f"""## {TITLES[model]}, {full / 1e6:.2f} MB in float32

![Bytes against quality](results/bench-{model}.svg)

{table(HEAD, compared) if (compared := against(good, full)) else "No other tool was measured on it yet."}

<details><summary>All {len(every)} rows</summary>

{table(head, every)}

</details>
"""


def page(rows: list[Row], run: dict[str, Any], table: Any) -> str:
    """The whole page."""
    sections = [
        section([row for row in rows if row["model"] == model], model, table)
        for model in TITLES
        if any(row["model"] == model and row["quality"] is not None for row in rows)
    ]
    failed = [
        [TITLES[row["model"]], NAMES[row["tool"]], row["version"], row["setting"], row["error"].replace("|", "\\|")]
        for row in rows
        if row["quality"] is None
    ]
    without = {model: [tool for tool in NAMES if (model, tool) not in {(row["model"], row["tool"]) for row in rows}] for model in TITLES}  # fmt: skip
    absent = "; ".join(f"{TITLES[model]} with {', '.join(NAMES[tool] for tool in tools)}" for model, tools in without.items() if tools)  # fmt: skip
    machine = ", ".join(f"{name} {value}" for name, value in run["machine"].items())
    versions = ", ".join(f"{name} {value}" for name, value in run["versions"].items())
    return f"""# Comparison with other tools

`benchmarks/pages.py` makes this page from `docs/results/bench.json`. `make bench` makes the rows. Each tool runs in its own environment.

* **Same data for all.** The encoder is calibrated on 256 Brown sentences, and judged on 512 others. Language models are calibrated on 128 windows of 128
  tokens of Brown, without its news. They are judged on 8,192 tokens of Brown's news, the State of the Union address of 2021 and Moby-Dick, in windows
  of 512 tokens (128 for the decoder, which was trained on such). Whisper is calibrated on 24 clips of spoken prompts, with what it wrote itself. It is judged
  on three clips of other prompts and on five sentences of LibriVox. EfficientNet is calibrated on 135 crops of 45 photographs, and judged on 116 crops of
  the Kodak photographs and of 20 photographs of ImageNet.
* **One judge.** Tools return dequantised weights. One evaluator puts them into the model. Octavo's artifact is loaded as users load it. Lower quality figures
  are better. For the encoder, quality is mean 1 − cosine of sentence vectors. For the others, it is mean KL divergence from the original's
  distributions: of the next token, or of the class. Each has a figure of use beside it: perplexity, the rate of wrong words (WER) in the five
  sentences, or the share of crops whose likeliest class is that of the original.
* **One rule for bytes.** Everything that is needed to restore the weights counts. Codes count at their nominal width. Scales and offsets count as the tool has them,
  floating ones at 16 bits. Weights that a tool leaves alone count 16 bits each. Tied tensors count once. This is the size of the tool's file if nothing were
  wasted; the file is often larger. Octavo's bytes are those of its files.
* **Embeddings.** Most tools leave embeddings alone. To keep this from deciding the comparison, each tool also gets rows with the embedding rounded to nearest in groups
  of 64 (`+ RTN embN g64`). These use the tool's own bits and fewer, down to about half of them.
* **Layers.** Every tool gets all layers that it takes. Most take linear ones only, so EfficientNet, which is of convolutions, stays large with them.
* **Plain** is round to nearest and GPTQ as Octavo has them, without its allocator and its coder.
* **Share** is Octavo's quality divided by that of the best other tool of at least that size. A share of 0.5 is half the damage in no more bytes.
* **Time and memory.** Seconds and GB are those of the tool's own work, in wall time on a shared machine. Latency is relative to float32 PyTorch in the same process. It is
  that of the tool's own runtime on one sequence: 32 tokens for the encoder, 128 for language models, one clip or crop for the others. A dash means that the tool has no runtime.

{chr(10).join(sections)}
## What did not run

{table(["model", "tool", "version", "setting", "error"], failed)}

Not tried: {absent}.

Command: `python benchmarks/bench.py`, {run["created"]}. {machine}. {versions}.
"""


def write(table: Any) -> None:
    """Write the page and the plots, if there are rows."""
    if not (RESULTS / "bench.json").exists():
        return
    rows = json.loads((RESULTS / "bench.json").read_text(encoding="utf-8"))
    run = json.loads((RESULTS / "bench-run.json").read_text(encoding="utf-8"))
    write_file(DOCS / "bench.md", page(rows, run, table).encode())
