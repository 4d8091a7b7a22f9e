"""SmolLM2 at about 1.6 and 1.3 bits a weight: the plans of two presets, and learned codebooks among the methods.

    python benchmarks/low_bits.py [--ratios 20,24] [--plans default,best,codebooks]

writes docs/results/low-bits.json row by row. All are calibrated on the benchmark's windows and judged on its 8,192
tokens, read back from disk. ``codebooks`` is the default preset with ``jlcm``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import CACHE, load_results, save_results, stat_bytes
from judges import judge
from models import TITLES

import octavo
from octavo.methods.selecting import select_methods

MODEL = "smollm2"
PLANS: dict[str, dict[str, Any]] = {
    "default": {},
    "best": {"preset": "best"},
    "codebooks": {"methods": [*map(str, select_methods(None, "default")), "jlcm"]},
}


def main() -> None:
    """Measure what is asked for, and save every row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratios", default="20,24")
    parser.add_argument("--plans", default=",".join(PLANS))
    asked = parser.parse_args()
    judged = judge(MODEL)
    for plan in asked.plans.split(","):
        for ratio in map(float, asked.ratios.split(",")):
            with tempfile.TemporaryDirectory() as work:
                room = CACHE / "low-bits" / f"{plan}-{ratio:g}"
                done = octavo.compress(
                    judged.source, ratio=ratio, data=judged.data, workspace=room, resume=True, **judged.options,
                    **PLANS[plan],
                )  # fmt: skip
                report = done.save(Path(work) / "artifact", progress=False)
                figures = judged.measure(judged.reload(Path(work) / "artifact"))
                size = stat_bytes(Path(work) / "artifact")
            row = {
                "model": TITLES[MODEL], "ratio": ratio, "plan": plan, "bytes": size,
                "bits_per_weight": size * 8 / judged.weights, "kl": figures["quality"], "perplexity": figures["second"],
                "codebook_sites": sum(point.method.startswith("jlcm") for point in done.built.plan.points.values()),
                "seconds": report.timings["total"], "threads": torch.get_num_threads(),
            }  # fmt: skip
            print(row, flush=True)
            # Another run may have added rows meanwhile.
            known = load_results("low-bits").get("rows", [])
            rows = [row, *(old for old in known if (old["ratio"], old["plan"]) != (ratio, plan))]
            rows.sort(key=lambda row: (row["ratio"], list(PLANS).index(row["plan"])))
            save_results("low-bits", {"rows": rows}, " ".join(sys.argv[1:]))


if __name__ == "__main__":
    main()
