"""MiniLM at 8, 16 and 32 with a cut among the methods and without: the plan with it must never be worse.

    python benchmarks/cut_plans.py [--minutes 10]

writes docs/results/cut-plans.json. Levels of the cut are compared by the loss on held-out data before anything is taught,
and no cut is one of them. Then the source teaches both plans for as long. Where no cut is kept, both plans are one, and
one is taught. The measure is mean 1 - cosine of 512 Brown sentences that nothing else reads.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import CACHE, brown, load_results, minilm, save_results
from distilled import unlabeled
from transformers import AutoModel

import octavo
from octavo.calibration.objective import Cosine
from octavo.cuts.structured import Structured
from octavo.sources.tokens import text_batches

RATIOS = (8, 16, 32)
METHODS = ["entropy", "keep"]


def main() -> None:
    """Compress with and without the cut at every ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="how long every plan is taught")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    _, test = brown()
    dense, objective, texts = AutoModel.from_pretrained(minilm()).eval(), Cosine(), unlabeled()
    judged = text_batches(minilm(), test, dense)
    reference, folder = objective.reference(dense, judged), CACHE / "cut-plans"

    def run(ratio: float, cut: list[Any], **more: Any) -> tuple[dict[str, Any], Any]:
        done = octavo.compress(minilm(), ratio=ratio, methods=[*cut, *METHODS], data=texts, progress=False, **more)
        done.save(folder, overwrite=True, progress=False)
        model = AutoModel.from_pretrained(folder).eval()
        row = {"ratio": ratio, "cut": bool(cut), "recover": more.get("recover", "none"), "bytes": done.built.bytes}
        row |= {"held_back": done.built.quality, "quality": float(objective.measure(model, judged, reference).mean())}
        if done.recovery is not None:
            row |= {"minutes": done.recovery.minutes, "steps": done.recovery.steps}
        if done.cut is not None:
            levels = [
                {"share": level.share, "alone": level.alone, "held_back": level.quality} for level in done.cut.levels
            ]
            row |= {"kept": done.cut.kept, "levels": levels}
        print(row, flush=True)
        return row, done

    rows: list[dict[str, Any]] = load_results("cut-plans").get("rows", [])
    for ratio in RATIOS:
        if any(row["ratio"] == ratio for row in rows):
            continue
        teaching = {"recover": "distill", "minutes": asked.minutes}
        cut = Structured(("head", "neuron"), "taylor")
        plain, _ = run(ratio, [])
        with_cut, found = run(ratio, [cut])
        rows += [plain, with_cut, run(ratio, [], **teaching)[0]]
        if found.cut.kept:
            rows.append(run(ratio, [cut], **teaching)[0])
        save_results("cut-plans", {"rows": rows}, f"--minutes {asked.minutes:g}")


if __name__ == "__main__":
    main()
