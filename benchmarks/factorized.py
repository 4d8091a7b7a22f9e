"""Factored and quantized networks that run as factors: size, quality, and latency beside dense.

    python benchmarks/factorized.py

Convolutional classifiers (CIFAR-10) and click-through models (MovieLens-100k), compressed by factorizations alone,
saved and loaded with factors=True at the batch that is timed. Writes docs/results/factorized.json. CIFAR-10 is looked
for in the folder OCTAVO_DATA; the models are trained once, and kept in ~/.cache/octavo.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import CACHE, save_results, stat_bytes
from torch import Tensor, nn

import octavo
from octavo.calibration.objective import KL, Objective
from octavo.recipes.frame import Lab, get_study
from octavo.recipes.frame.bases import classifier, images
from octavo.recipes.frame.nets import in_batches
from octavo.recipes.testbeds.ctr import ClickKL, auc, clicks, clicks_model
from octavo.runtimes.packed import factored
from octavo.runtimes.packed.speed import interleaved
from octavo.training import accuracy

BATCHES = (1, 64)
#: Turns of which the least counts, what else the machine does only adding to it, and how often that is done anew.
ROUNDS, REPEATS = 30, 5


@dataclass(frozen=True)
class Case:
    """A model, how many times smaller it is made, what it is calibrated and timed with, and what it is worth."""

    name: str
    ratios: tuple[int, ...]
    model: nn.Module
    objective: Objective
    inputs: Tensor
    metric: str
    quality: Callable[[nn.Module], float]


def cases() -> list[Case]:
    """Trained now or before."""
    lab = Lab(get_study("trp"), show=print)
    pictures, found = images(lab, "cifar10"), clicks(lab)
    right = lambda model: 100 * accuracy(model, in_batches(pictures.test))  # noqa: E731
    area = lambda model: auc(model, found.test)  # noqa: E731
    # At coarser ratios the widest layers alone have ranks at which two products are less work than one.
    small, wide = (8,), (8, 16, 32)
    nets = {"ResNet-14, width 16": (small, 16), "ResNet-14, width 32": (wide, 32)}
    layers = {"CTR, MLP 256-128": (small, (256, 128)), "CTR, MLP 1024-1024": (wide, (1024, 1024))}
    return [
        *(Case(name, ratios, classifier(lab, 0, "cifar10", width=width), KL(), pictures.train[0][:256], "test accuracy (%)", right)
          for name, (ratios, width) in nets.items()),
        *(Case(name, ratios, clicks_model(lab, found, 0, hidden=hidden), ClickKL(), found.train[0][:4096], "test AUC (%)", area)
          for name, (ratios, hidden) in layers.items()),
    ]  # fmt: skip


def timed(case: Case, path: Any, size: int) -> dict[str, Any]:
    """Latency of the model as it was and from its factors, in turns, and how every site runs."""
    batch = case.inputs[:size]
    dense, factors = case.model.eval(), octavo.load(path, copy.deepcopy(case.model), factors=True, batch=batch).eval()
    runs = {"dense": lambda: dense(batch), "factors": lambda: factors(batch)}
    seconds = [interleaved(runs, ROUNDS, of=min) for _ in range(REPEATS)]
    speedups = [found["dense"] / found["factors"] for found in seconds]
    forms = octavo.Artifact(path).sites
    sites = {
        name: {
            "form": forms[name]["form"]["form"],
            "runs": "factors" if choice.as_factors else "dense",
            "reason": choice.reason,
            "seconds": choice.seconds,
        }
        for name, choice in factored(factors).items()
    }
    return {
        "batch": size,
        "seconds": {name: min(found[name] for found in seconds) for name in runs},
        "speedup": statistics.median(speedups),
        "speedups": speedups,
        # All repetitions must agree.
        "verdict": "slower" if max(speedups) < 1 else "faster" if min(speedups) > 1 else "as fast",
        "as factors": sum(site["runs"] == "factors" for site in sites.values()),
        "factored": len(sites),
        "quality": case.quality(factors),
        "sites": sites,
    }


def measured(case: Case, ratio: int) -> dict[str, Any]:
    """One artifact, written, read and timed."""
    path = CACHE / "factorized" / f"{case.name.replace(', ', '-').replace(' ', '-')}-{ratio}"
    batches = list(case.inputs.split(64))
    done = octavo.compress(
        copy.deepcopy(case.model), ratio=ratio, data=batches, objective=case.objective, methods=["factorize"]
    )
    done.save(path, overwrite=True)
    row = {
        "model": case.name,
        "metric": case.metric,
        "asked": ratio,
        "ratio": done.ratio,
        "bytes": stat_bytes(path),
        "source": case.quality(case.model),
        "artifact": case.quality(octavo.load(path, copy.deepcopy(case.model)).eval()),
        "latency": [timed(case, path, size) for size in BATCHES],
    }
    shown = [f"batch {t['batch']}: {t['speedup']:.2f} ({t['as factors']} of {t['factored']})" for t in row["latency"]]
    print(case.name, ratio, f"{row['source']:.2f} -> {row['artifact']:.2f}", *shown, flush=True)
    return row


def main() -> None:
    """Measure and save."""
    rows = [measured(case, ratio) for case in cases() for ratio in case.ratios]
    told = [
        f"{row['model']}, {row['asked']} times smaller, batch {t['batch']}: {t['verdict']} ({t['speedup']:.2f})"
        for row in rows
        for t in row["latency"]
    ]
    summary = {word: [line for line in told if f": {word} (" in line] for word in ("faster", "as fast", "slower")}
    save_results("factorized", {"threads": torch.get_num_threads(), "summary": summary, "rows": rows})


if __name__ == "__main__":
    main()
