"""How far quantizers are from the rate-distortion bound, on random and on real weights.

    python benchmarks/rate_distortion.py [--sources gaussian,minilm] [--quantizers trellis]

writes docs/results/rate-distortion.json, and measures only rows that are not in it yet. No evidence is used, so that the
loss is the squared error alone. The rate is all bytes of the stored form. The bound is that of independent weights with
the distribution of each row's own size: computed for the Gaussian, by Blahut's and Arimoto's algorithm for others. Sizes
of rows are known to the bound for nothing, and rates follow them in reverse water-filling. Real weights are whole matrices
of MiniLM's encoder and of Whisper's text decoder, which were never quantized.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from common import load_results, save_results
from models import TITLES, load_model, model_folder
from torch import Tensor, nn

from octavo.artifact import pack, unpack
from octavo.calibration.evidence import Evidence
from octavo.forms import Form
from octavo.methods import get_method
from octavo.methods.base import Setting

#: Bits a weight at which quantizers are compared.
RATES = (1.0, 1.5, 2.0, 3.0, 4.0)
#: Random matrices, and the layers of real models whose matrices are taken.
SIZE, LAYERS = 1024, {"minilm": ("encoder.layer.0.", "encoder.layer.3."), "whisper": ("model.decoder.layers.1.",)}
SOURCES = ("gaussian", "laplacian", *LAYERS)
#: The method of each quantizer, and the settings of those that have no continuous one.
FIXED: dict[str, tuple[str, list[Setting]]] = {
    "round to nearest": ("rtn", [{"bits": bits, "group": 64} for bits in (2, 3, 4)]),
    "Lloyd-Max": ("kmeans", [{"values": count} for count in (2, 3, 4, 8, 16)]),
    "product codes": (
        "vector-codes",
        [
            {"width": 8, "entries": 256, "books": 1},
            {"width": 4, "entries": 64, "books": 1},
            {"width": 4, "entries": 256, "books": 1},
            {"width": 2, "entries": 64, "books": 1},
            {"width": 2, "entries": 256, "books": 1},
        ],
    ),
    "NVFP4": ("small-floats", [{"values": "e2m1", "group": 16, "scale": "e4m3"}]),
    "MXFP4": ("small-floats", [{"values": "e2m1", "group": 32, "scale": "power"}]),
}
ELASTIC = {"scalar, entropy-coded": "entropy", "E8, entropy-coded": "e8", "trellis, entropy-coded": "trellis"}
#: Rates are met to this precision by bisecting the continuous setting.
_CLOSE, _HALVINGS = 0.004, 24
#: Cells of a distribution on either side of zero, the widest of them in units of its deviation, and slopes of a curve.
_CELLS, _WIDEST, _SLOPES, _ROUNDS = 400, 12.0, 40, 400


def matrices(source: str) -> Iterator[Tensor]:
    """Weight matrices, float32."""
    if source in LAYERS:
        model: nn.Module = load_model(source, model_folder(source))
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name.startswith(LAYERS[source]):
                yield module.weight.detach()
        return
    torch.manual_seed(0)
    drawn = torch.randn(SIZE, SIZE)
    yield drawn if source == "gaussian" else torch.distributions.Laplace(0.0, 0.5**0.5).sample((SIZE, SIZE))


@dataclass(frozen=True)
class Bound:
    """The least rate of a distribution of variance one by its squared error: points of falling error, in bits."""

    errors: Tensor
    rates: Tensor

    def rate(self, error: Tensor) -> Tensor:
        """Bits a weight, linear in the logarithm of the error; none where the error is the variance."""
        x, known = -error.double().log2(), -self.errors.log2()
        right = torch.searchsorted(known, x).clamp(1, len(known) - 1)
        share = (x - known[right - 1]) / (known[right] - known[right - 1])
        found = self.rates[right - 1] + share * (self.rates[right] - self.rates[right - 1])
        return torch.where(error >= 1, 0.0, found.clamp_min(0.0))


def bound_of(weights: Tensor | None) -> Bound:
    """The bound of normalized weights; of the Gaussian if there are none."""
    errors = torch.logspace(0, -7, 400, base=4.0, dtype=torch.float64)
    if weights is None:
        return Bound(errors, -errors.log2() / 2)
    # Cells are narrow where weights are dense.
    places = torch.linspace(-1, 1, 2 * _CELLS + 1, dtype=torch.float64)
    places = places.sign() * (places.abs() * 4).expm1() / math.expm1(4) * _WIDEST
    index = torch.bucketize(weights.double().flatten(), (places[1:] + places[:-1]) / 2)
    share = torch.bincount(index, minlength=len(places)).double()
    share /= share.sum()
    square = (places[:, None] - places[None]).square()
    points = []
    output = torch.full_like(share, 1 / len(share))
    for slope in torch.logspace(-1, 3.2, _SLOPES, dtype=torch.float64).tolist():
        kernel = torch.exp(-slope * square)
        for _ in range(_ROUNDS):
            total = kernel @ output
            output = (output * (kernel.t() @ (share / total.clamp_min(1e-300)))).clamp_min(1e-300)
        total = kernel @ output
        joint = share[:, None] * kernel * output / total[:, None]
        error = float((joint * square).sum())
        rate = float(-(share * total.log2()).sum()) - slope * error / math.log(2)
        points.append((error, rate))
    errors, rates = torch.tensor([(1.0, 0.0), *points], dtype=torch.float64).unbind(1)
    return Bound(errors, rates)


@cache
def facts(source: str) -> tuple[list[Tensor], Tensor, Bound]:
    """Matrices, the sizes of all their rows with as many of each as columns, and the bound of normalized weights."""
    found = list(matrices(source))
    sizes = [weight.double().square().mean(1).sqrt() for weight in found]
    normal = torch.cat([(weight / size[:, None]).flatten() for weight, size in zip(found, sizes, strict=True)])
    spread = torch.cat([size.repeat_interleave(weight.shape[1]) for weight, size in zip(found, sizes, strict=True)])
    return found, spread.square(), bound_of(None if source == "gaussian" else normal)


def least_rate(source: str, error: float) -> float:
    """The bound's bits a weight at a mean squared error: every row gets the same error, or its variance."""
    _, variances, bound = facts(source)
    values, counts = variances.unique(return_counts=True)
    low, high = 0.0, float(values.max())
    for _ in range(60):
        level = (low + high) / 2
        spent = float((values.clamp_max(level) * counts).sum() / counts.sum())
        low, high = (level, high) if spent < error else (low, level)
    return float((bound.rate(high / values) * counts).sum() / counts.sum())


def stored(source: str, method: str, setting: Callable[[Tensor, Evidence], Setting]) -> dict[str, float]:
    """Rate, error and speeds of one setting on all matrices of a source, through bytes and back."""
    encoding = decoding = error = 0.0
    size = count = 0
    for weight in facts(source)[0]:
        evidence = Evidence(torch.ones(len(weight)), None)
        chosen = setting(weight, evidence)
        started = time.perf_counter()
        form: Form = get_method(method).encode(weight, chosen, evidence)
        packed = pack(form)
        encoding += time.perf_counter() - started
        content = memoryview(packed.blob)
        started = time.perf_counter()
        again = unpack(content, packed.parts, packed.meta, tuple(weight.shape)).dense()
        decoding += time.perf_counter() - started
        error += float((weight - again).double().square().sum())
        size, count = size + packed.bytes, count + weight.numel()
    return {
        "rate": 8 * size / count,
        "error": error / count,
        "encode": count / encoding / 1e6,
        "decode": count / decoding / 1e6,
    }


def at_rate(source: str, method: str, rate: float) -> dict[str, float]:
    """What a method with a continuous setting does at a rate: one step for all matrices, relative to nothing."""
    found = get_method(method)

    def measured(octaves: float) -> dict[str, float]:
        def setting(weight: Tensor, evidence: Evidence) -> Setting:
            return found.at(found.settings(weight, evidence)[0], octaves)

        return stored(source, method, setting)

    # A deviation of one sixteenth of the weights' own to sixteen times it.
    own = math.log2(float(facts(source)[1].mean().sqrt())) if method != "e8" else 0.0
    low, high = own - 5.0, own + 3.0
    result = measured((low + high) / 2)
    for _ in range(_HALVINGS):
        if abs(result["rate"] - rate) < _CLOSE * rate:
            break
        middle = (low + high) / 2
        result = measured(middle)
        low, high = (middle, high) if result["rate"] > rate else (low, middle)
    return result


def rows(source: str, quantizer: str) -> list[dict[str, Any]]:
    """All points of a quantizer on a source, with their distance to the bound in bits a weight and in decibels."""
    if quantizer in ELASTIC:
        found = [at_rate(source, ELASTIC[quantizer], rate) for rate in RATES]
    else:
        method, settings = FIXED[quantizer]
        found = [stored(source, method, lambda weight, evidence, own=own: own) for own in settings]
    made = []
    for row in found:
        made.append({**row, **distance(source, row)})
    return made


def distance(source: str, row: dict[str, float]) -> dict[str, float]:
    """Distance of a point to the bound; below zero where weights have structure that the bound does not know."""
    bits = row["rate"] - least_rate(source, row["error"])
    # The error that the bound has at this rate, by bisection.
    low, high = 1e-12 * row["error"], 16 * row["error"]
    for _ in range(50):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if least_rate(source, middle) > row["rate"] else (low, middle)
    return {"bits_over": bits, "decibels_over": 10 * math.log10(row["error"] / high)}


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = (*FIXED, *ELASTIC)
    parser.add_argument("--sources", default=",".join(SOURCES))
    parser.add_argument("--quantizers", default=";".join(known), help="names, separated by semicolons")
    asked = parser.parse_args()
    results: dict[str, Any] = {"curves": [], **load_results("rate-distortion")}
    for source in asked.sources.split(","):
        for quantizer in asked.quantizers.split(";"):
            if any((row["source"], row["quantizer"]) == (source, quantizer) for row in results["curves"]):
                continue
            made = rows(source, quantizer)
            for row in made:
                print(source, quantizer, {name: round(value, 4) for name, value in row.items()}, flush=True)
            title = TITLES.get(source, source)
            results["curves"].append({"source": source, "title": title, "quantizer": quantizer, "points": made})
            save_results("rate-distortion", results)


if __name__ == "__main__":
    main()
