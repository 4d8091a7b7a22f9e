"""EfficientNet-Lite0 with channels cut to half of its multiply-adds: what it still says of photographs.

    python benchmarks/cut_photos.py [--minutes 20]

writes docs/results/cut-photos.json. All places give up the same share of channels, found by bisection. The cut is made
without any training, with and without compensation, and by octavo.compress with the source as teacher: crops of the
photographs to calibrate with, mirrored at random and without labels, teach. Agreement is that of the most likely class
with the source's, on crops of other photographs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import CACHE, load_results, save_results
from models import PHOTOS, load_model, model_folder
from photos import Lite0, crops_to_learn, photographs
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import octavo
from octavo.calibration.objective import KL
from octavo.cuts import saved
from octavo.cuts.structured import Structured
from octavo.runtimes.onnx.latency import compare

SHARE = 0.5
#: Crops of every photograph that teach.
CROPS = 24
SCORES = ("taylor", "magnitude", "activation", "norm-scale")
BATCH = 16


@torch.no_grad()
def multiply_adds(net: nn.Module, image: Tensor) -> int:
    """Multiply-adds of one image."""
    with FlopCounterMode(display=False) as counter:
        net(image)
    return counter.get_total_flops() // 2


def halved(cut: Structured, net: nn.Module, images: list[Tensor]) -> tuple[nn.Module, int]:
    """The net with the fewest channels removed that halve its multiply-adds, and how many weights went."""
    units, image = cut.units(net), images[0][:1]
    evidence = cut.observe(net, images)
    scores = cut.scores(net, units, evidence)
    whole = multiply_adds(net, image)
    low, high = 0.0, 0.8
    while high - low > 0.004:
        share = (low + high) / 2
        kept = cut.keeping(net, units, scores, {part.name: share for part in units})
        made = cut.apply(net, kept, evidence)
        low, high = (low, share) if multiply_adds(made, image) <= SHARE * whole else (share, high)
    kept = cut.keeping(net, units, scores, {part.name: high for part in units})
    return cut.apply(net, kept, evidence), saved(net, units, kept)


@torch.inference_mode()
def logs(net: nn.Module, photos: Tensor) -> Tensor:
    """Logarithms of the probabilities of all classes."""
    return torch.cat([net(part).log_softmax(-1) for part in photos.split(32)])


def judged(net: nn.Module, photos: Tensor, before: Tensor) -> dict[str, float]:
    """Agreement of the most likely class, and divergence."""
    after = logs(net, photos)
    return {
        "agreement": float((after.argmax(-1) == before.argmax(-1)).double().mean()),
        "kl": float((before.exp() * (before - after)).sum(-1).mean()),
    }


def compared(net: nn.Module, seen: list[Tensor], judge: Callable[[nn.Module], dict[str, float]]) -> dict[str, Any]:
    """Every score without training, and the speed of the first one's cut.

    The last third of the batches only says which cut is the best.
    """
    seen, held = seen[: 2 * len(seen) // 3], torch.cat(seen[2 * len(seen) // 3 :])
    rows, image, thinner, before = [], seen[0][:1], net, logs(net, held)
    for score in SCORES:
        for compensate in (True, False):
            cut = Structured(("channel",), score, compensate, KL(), seen[0])
            made, gone = halved(cut, net, seen)
            row = {"score": score, "compensate": compensate, "weights": gone, **judge(made)}
            row["kl_held_back"] = judged(made, held, before)["kl"]
            row["multiply_adds"] = multiply_adds(made, image) / multiply_adds(net, image)
            print(row, flush=True)
            thinner = thinner if rows else made
            rows.append(row)
    speed = {}
    for size in (1, BATCH):
        calls = {"dense": partial(net, seen[0][:size]), "cut": partial(thinner, seen[0][:size])}
        with torch.inference_mode():
            speed[str(size)] = compare(calls, "dense", rounds=9, seconds=10)["cut"]
    return {"share": SHARE, "rows": rows, "speed": speed, "threads": torch.get_num_threads()}


def taught(net: nn.Module, best: dict[str, Any], minutes: float) -> tuple[nn.Module, dict[str, Any]]:
    """The best cut as an artifact, after the source has taught it."""
    whole = sum(tensor.nbytes for tensor in net.state_dict().values())
    methods = [Structured(("channel",), best["score"], best["compensate"])]
    data = list(crops_to_learn(CROPS).split(BATCH))
    ratio = whole / (whole - 4 * best["weights"])
    done = octavo.compress(
        net, ratio=ratio, methods=methods, data=data, objective="kl", recover="distill", minutes=minutes
    )
    folder = CACHE / "cut-photos"
    report = done.save(folder, overwrite=True)
    assert done.recovery is not None
    figures = {"minutes": done.recovery.minutes, "steps": done.recovery.steps, "examples": done.recovery.examples}
    return octavo.load(folder, into=Lite0()).eval(), {**figures, "bytes": report.artifact.bytes, "source_bytes": whole}


def main() -> None:
    """Cut by every score, then teach the best."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=0.0, help="how long to teach; not at all by default")
    asked = parser.parse_args()
    net = load_model(PHOTOS, model_folder(PHOTOS)).eval()
    first, photos = photographs()
    seen = list(first.split(BATCH))
    judge = partial(judged, photos=photos, before=logs(net, photos))
    results = load_results("cut-photos")
    if "rows" not in results:
        results = {"photographs": len(photos), **compared(net, seen, judge)}
        save_results("cut-photos", results)
    if asked.minutes:
        best = min(results["rows"], key=lambda row: row["kl_held_back"])
        made, figures = taught(net, best, asked.minutes)
        results["taught"] = {**figures, "score": best["score"], **judge(made)}
        results["taught"]["multiply_adds"] = multiply_adds(made, photos[:1]) / multiply_adds(net, photos[:1])
        save_results("cut-photos", results, f"--minutes {asked.minutes:g}")


if __name__ == "__main__":
    main()
