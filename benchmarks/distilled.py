"""High ratios with and without recovery by distillation, on unlabeled text.

    python benchmarks/distilled.py [--model minilm] [--ratios 16,24,32,48] [--minutes 60]

writes docs/results/distilled.json row by row. The folder of data that OCTAVO_DATA names must be there: the sentences of
SST-2's and STS-B's training parts and of WikiText-2 teach, without their labels. Of an encoder, Spearman's correlation on
STS-B's development part and 1 - cosine of the same sentences are measured, which nothing else reads; of a language model,
the KL divergence on held-out windows.
"""

from __future__ import annotations

import argparse
import csv
import random
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import load_results, save_results, shared_data
from judges import Language
from models import ENCODER, TITLES, load_model, model_folder
from scipy.stats import spearmanr

import octavo
from octavo.calibration.objective import Cosine
from octavo.sources.tokens import text_batches


def table(name: str) -> list[list[str]]:
    """Rows of a file of the folder of data."""
    file = shared_data(name)
    if file is None:
        sys.exit(f"{name} is missing: OCTAVO_DATA names the folder with it")
    delimiter = "\t" if file.suffix == ".tsv" else ","
    return list(csv.reader(file.read_text(encoding="utf-8").splitlines(), delimiter=delimiter, quoting=csv.QUOTE_MINIMAL
                           if delimiter == "," else csv.QUOTE_NONE))  # fmt: skip


def unlabeled() -> list[str]:
    """Different sentences in random order, none of which is judged."""
    found = {row[0].strip() for row in table("sst2-train.tsv")}
    found |= {sentence.strip() for row in table("stsb-train.csv") for sentence in row[:2]}
    file = shared_data("wikitext2-valid.txt")
    text = "" if file is None else re.sub(r"<unk>| @(.)@ ", r"\1", file.read_text(encoding="utf-8"))
    parts = (part.strip() for line in text.splitlines() for part in re.split(r"(?<= [.!?]) ", line))
    found |= {part for part in parts if len(part.split()) > 4 and not part.startswith("=")}
    judged = {sentence.strip() for row in table("stsb-dev.csv") for sentence in row[:2]}
    kept = sorted(found - judged - {""})
    random.Random(0).shuffle(kept)
    return kept


class Pairs:
    """An encoder, by pairs of sentences with a score."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows = folder, table("stsb-dev.csv")
        self.source = self.vectors(load_model(ENCODER, folder))

    @torch.inference_mode()
    def vectors(self, model: Any) -> torch.Tensor:
        """Vectors of the first sentences, then of the second."""
        sentences = [row[side] for side in (0, 1) for row in self.rows]
        order = sorted(range(len(sentences)), key=lambda place: len(sentences[place]))
        batches = text_batches(self.folder, [sentences[place] for place in order], model, size=64)
        found = torch.cat([Cosine().outputs(model, batch) for batch in batches])
        return found[torch.tensor(order).argsort()]

    def measure(self, model: Any) -> dict[str, float]:
        found = self.vectors(model)
        first, second = found.chunk(2)
        likeness = torch.cosine_similarity(first, second)
        return {
            "quality": float((1 - torch.cosine_similarity(found, self.source)).mean()),
            "spearman": float(spearmanr(likeness.numpy(), [float(row[2]) for row in self.rows]).statistic),
        }


def main() -> None:
    """Measure and save every row that is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=ENCODER, choices=(ENCODER, "smollm2"))
    parser.add_argument("--ratios", default="16,24,32,48")
    parser.add_argument("--minutes", type=float, default=60)
    asked = parser.parse_args()
    folder, texts = model_folder(asked.model), unlabeled()
    judge: Any = Pairs(folder) if asked.model == ENCODER else Language(asked.model)

    def save(row: dict[str, Any]) -> None:
        print(row, flush=True)
        key = ("model", "ratio", "recover")
        # Another run may have added rows meanwhile.
        rows = [old for old in load_results("distilled").get("rows", []) if any(old[k] != row[k] for k in key)]
        save_results(
            "distilled",
            {"rows": sorted([*rows, row], key=lambda row: (row["model"], row["ratio"], row["recover"] != "none"))},
            " ".join(sys.argv[1:]),
        )

    if asked.model == ENCODER:
        first = {"model": TITLES[asked.model], "ratio": 1.0, "recover": "none"}
        save({**first, **judge.measure(load_model(asked.model, folder))})
    for ratio in map(float, asked.ratios.split(",")):
        with tempfile.TemporaryDirectory() as work:
            for kind in ("none", "distill"):
                more = {"recover": kind, "minutes": asked.minutes} if kind == "distill" else {}
                done = octavo.compress(folder, ratio=ratio, data=texts, progress=None, **more)
                report = done.save(Path(work) / kind, progress=False)
                row = {"model": TITLES[asked.model], "ratio": ratio, "recover": kind, "bytes": report.artifact.bytes}
                if done.recovery is not None:
                    row |= {"minutes": done.recovery.minutes, "steps": done.recovery.steps}
                    row |= {"examples": done.recovery.examples}
                row |= {"held_back": done.built.quality, "seconds": report.timings["total"]}
                row |= {"threads": torch.get_num_threads()}
                save({**row, **judge.measure(load_model(asked.model, Path(work) / kind))})


if __name__ == "__main__":
    main()
