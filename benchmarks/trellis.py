"""Trellis-coded against scalar quantization, both entropy-coded, in equal bytes: synthetic weights, MiniLM, decoding.

`python benchmarks/trellis.py` writes docs/results/trellis.json.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from common import brown, minilm, save_results

from octavo.artifact import pack, unpack
from octavo.calibrate import Calibration, calibrate
from octavo.evidence import Evidence
from octavo.integrations.transformers import text_batches
from octavo.job import Job, replaced
from octavo.methods import get_method
from octavo.methods.quantize.viterbi import best_path
from octavo.request import open_job

METHODS = ("entropy", "trellis")
#: Bits a weight, nominally, of synthetic weights.
LEVELS = (5.0, 4.0, 3.0, 2.5, 2.0, 1.5, 1.0)
#: Steps for all of MiniLM: near ratios 24, 16, 12, 8 and 6.
STEPS = (2.8e-4, 2.0e-4, 1.4e-4, 8.5e-5, 5.5e-5)


def synthetic() -> list[dict[str, Any]]:
    """Signal to noise of independent weights; for Gaussian ones also how far it stays below the bound 6.02 dB a bit."""
    uniform = torch.rand(2048, 512, generator=torch.Generator().manual_seed(0)).clamp(1e-6, 1 - 1e-6)
    rows = []
    for kind, spread in (
        ("gaussian", torch.distributions.Normal(0, 1)),
        ("laplacian", torch.distributions.Laplace(0, 0.5**0.5)),
    ):
        weight, nothing = spread.icdf(uniform), Evidence(torch.ones(2048), None)
        for name in METHODS:
            for level in LEVELS:
                form = get_method(name).encode(weight, {"step": 2 ** (2.05 - level)}, nothing)
                bits = 8 * pack(form).bytes / weight.numel()
                decibels = -10 * math.log10(float((weight - form.dense()).square().mean()))
                row = {"weights": kind, "method": name, "bits": bits, "decibels": decibels}
                rows.append({**row, "below_bound": 20 * math.log10(2) * bits - decibels} if kind == "gaussian" else row)
    return rows


class Bench:
    """MiniLM with evidence from 256 sentences, measured on 512 others."""

    def __init__(self) -> None:
        calibration, test = brown()
        self.job: Job = open_job(minilm(), calibration, None, None, "default", (), {}, 0, lambda *_: None)
        self.found: Calibration = calibrate(
            self.job.source, self.job.sites, self.job.calibration_data, self.job.objective
        )
        self.test = text_batches(minilm(), test)
        self.module = self.job.source.module
        assert self.module is not None
        with replaced(self.module, {}):
            self.reference = self.job.objective.reference(self.module, self.test)

    def row(self, name: str, step: float) -> dict[str, Any]:
        """One step for all sites: exact artifact bytes, expected and measured loss, seconds of the processor."""
        packed, weights, expected, seconds = {}, {}, 0.0, 0.0
        for site in self.job.sites:
            weight, evidence = self.job.matrix(site), self.found.evidence[site.name]
            started = time.process_time()
            form = get_method(name).encode(weight, {"step": step}, evidence)
            seconds += time.process_time() - started
            packed[site.name] = pack(form)
            expected += evidence.loss(form.dense() - weight)
            weights[site.name] = site.layout.from_matrix(form.dense(), site.shape)
        self.packed = packed
        with replaced(self.module, {self.job.source.parameters[name]: weight for name, weight in weights.items()}):
            quality = float(self.job.objective.measure(self.module, self.test, self.reference).mean())
        size = self.job.contents(packed, torch.float16).bytes
        return {
            "method": name,
            "step": step,
            "bytes": size,
            "expected": expected,
            "quality": quality,
            "seconds": seconds,
        }

    def decoding(self) -> float:
        """Weights a second from packed bytes to float32, with all threads."""
        weights, started = 0, time.perf_counter()
        for site in self.job.sites:
            item = self.packed[site.name]
            unpack(memoryview(item.blob), item.parts, item.meta, (site.rows, site.columns)).dense()
            weights += site.rows * site.columns
        return weights / (time.perf_counter() - started)


def in_equal_bytes(rows: Sequence[dict[str, Any]], measure: str) -> list[dict[str, float]]:
    """What the trellis leaves of the loss that scalar quantization has in as many bytes, log-linear between steps."""
    scalar = sorted((row["bytes"], row[measure]) for row in rows if row["method"] == "entropy")
    sizes, losses = np.log(np.array(scalar)).T
    return [
        {"bytes": row["bytes"], "share": row[measure] / float(np.exp(np.interp(math.log(row["bytes"]), sizes, losses)))}
        for row in rows
        if row["method"] == "trellis" and sizes[0] <= math.log(row["bytes"]) <= sizes[-1]
    ]


def main() -> None:
    """Measure and save."""
    # Compiled before anything is timed.
    best_path(np.zeros(8, np.float32), np.zeros(8, np.int32), np.zeros((1, 2), np.float32), np.zeros(4, np.int64))
    results: dict[str, Any] = {"synthetic": synthetic()}
    bench, rows, speed = Bench(), [], {}
    for name in METHODS:
        for step in STEPS:
            rows.append(bench.row(name, step))
            print(rows[-1], flush=True)
        speed[name] = max(bench.decoding() for _ in range(3))
    results["minilm"] = {
        "title": "all-MiniLM-L6-v2, one step for all sites", "rows": rows, "decoded_weights_per_second": speed,
        "share_of_expected_loss": in_equal_bytes(rows, "expected"), "share_of_loss": in_equal_bytes(rows, "quality"),
    }  # fmt: skip
    save_results("trellis", results)


if __name__ == "__main__":
    main()
