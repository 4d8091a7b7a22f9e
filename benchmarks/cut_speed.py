"""MiniLM cut to half of its linear weights: how much faster it runs than dense, and what each score of units loses.

    python benchmarks/cut_speed.py [--minutes 60]

writes docs/results/cut-speed.json. Half of all heads and half of all neurons go. Dense and cut models take turns in one
process, one thread, on sentences of 32 tokens; quality is that of 512 Brown sentences that the cut never saw. With
--minutes the cut by the first score is made by octavo.compress and taught on unlabeled sentences
(benchmarks/distilled.py), and the taught model is compressed for speed, for onnxruntime. What the file of results has
already is not measured again. Without teaching it takes ten minutes.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

import torch
from common import CACHE, brown, load_results, minilm, save_results
from distilled import unlabeled
from torch import nn
from transformers import AutoModel, AutoTokenizer

import octavo
from octavo.calibration.objective import Cosine
from octavo.cuts import best, saved
from octavo.cuts.structured import Structured
from octavo.runtimes.onnx.latency import compare
from octavo.runtimes.onnx.sessions import Session
from octavo.sources.tokens import text_batches

SHARE = 0.5
BATCHES = (1, 16)
#: Scores that are compared, all but the last with compensation.
SCORES = ("taylor", "fisher", "obs", "activation", "magnitude")
FASTEST = "taylor"
#: The taught model, and how much faster than itself in PyTorch it is asked to be.
TAUGHT, SPEEDUP = CACHE / "cut-speed" / "taught", 4.5


def linear_weights(model: nn.Module) -> int:
    """Weights of all linear layers of the blocks."""
    layers: Any = model.get_submodule("encoder.layer")
    return sum(part.weight.numel() for part in layers.modules() if isinstance(part, nn.Linear))


def recovered(weights: int, minutes: float, judged: list[Any], reference: list[torch.Tensor]) -> dict[str, Any]:
    """The cut of so many weights as an artifact, taught on unlabeled text."""
    whole = sum(file.stat().st_size for file in minilm().glob("*.safetensors"))
    methods = [Structured(("head", "neuron"), FASTEST)]
    asked = {"ratio": whole / (whole - 4 * weights), "methods": methods, "data": unlabeled()}
    done = octavo.compress(minilm(), recover="distill", minutes=minutes, **asked)
    report = done.save(TAUGHT, overwrite=True, progress=False)
    made = AutoModel.from_pretrained(TAUGHT).eval()
    cosine = 1 - float(Cosine().measure(made, judged, reference).mean())
    assert done.recovery is not None
    figures = {"minutes": done.recovery.minutes, "steps": done.recovery.steps, "examples": done.recovery.examples}
    figures |= {"held_back": done.recovery.after, "bytes": report.artifact.bytes}
    return {**figures, "linear": linear_weights(made), "cosine": cosine}


def quick(
    given: list[Any], tokens: dict[str, torch.Tensor], judged: list[Any], reference: list[torch.Tensor]
) -> dict[str, Any]:
    """The taught model compressed for speed: its speed beside the dense model in PyTorch, and its quality."""
    dense = AutoModel.from_pretrained(minilm()).eval()
    # Of the cut model in PyTorch; the dense one is about half as fast as that.
    taught = octavo.load(TAUGHT).eval()
    done = octavo.compress(taught, target="speed", speedup=SPEEDUP, data=given, objective="cosine")
    report = done.save(CACHE / "cut-speed" / "quick", overwrite=True, progress=False)
    session = Session(CACHE / "cut-speed" / "quick" / "model.onnx", threads=1)
    found = {}
    for size in BATCHES:
        batch = {name: value[:size] for name, value in tokens.items()}
        calls = {"dense": partial(dense, **batch), "quick": partial(session, **batch)}
        found[str(size)] = compare(calls, "dense", rounds=21 if size == 1 else 9, seconds=10)["quick"]
    return {
        "speed": found,
        "kernels": report["speed"]["kernels"],
        "cosine": 1 - float(Cosine().measure(session, judged, reference).mean()),
    }


def main() -> None:
    """Cut with every score and time the model of one; teach it, and compress it for speed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=0.0, help="how long to teach; not at all by default")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    calibration, test = brown()
    dense, objective = AutoModel.from_pretrained(minilm()).eval(), Cosine()
    given, judged = text_batches(minilm(), calibration, dense), text_batches(minilm(), test, dense)
    reference = objective.reference(dense, judged)
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    long = [text for text in test if len(tokenizer(text)["input_ids"]) >= 32][: max(BATCHES)]
    tokens = dict(tokenizer(long, truncation=True, max_length=32, return_tensors="pt"))
    results: dict[str, Any] = load_results("cut-speed")
    if "speed" not in results:
        results = {"share": SHARE, "tokens": 32, "threads": 1, **compared(dense, given, judged, reference, tokens)}
        save_results("cut-speed", results)
    if asked.minutes:
        if results.get("recovered", {}).get("minutes", 0) < asked.minutes:
            taught = recovered(results["scores"][0]["weights"], asked.minutes, judged, reference)
            results["recovered"] = {**taught, "linear": taught["linear"] / linear_weights(dense)}
            save_results("cut-speed", results, f"--minutes {asked.minutes:g}")
        results["quick"] = quick(given, tokens, judged, reference)
        save_results("cut-speed", results, f"--minutes {asked.minutes:g}")


def compared(
    dense: nn.Module,
    given: list[Any],
    judged: list[Any],
    reference: list[torch.Tensor],
    tokens: dict[str, torch.Tensor],
) -> dict[str, Any]:
    """Every score, and the speed of the first one's cut."""
    objective, thinner = Cosine(), dense
    rows: list[dict[str, Any]] = []
    for name in SCORES:
        for compensate in (True, False) if name == FASTEST else (True,):
            began = time.perf_counter()
            cut = Structured(("head", "neuron"), name, compensate, objective)
            units, evidence = cut.units(dense), cut.observe(dense, given)
            kept = best(cut.scores(dense, units, evidence), SHARE)
            made = cut.apply(dense, kept, evidence)
            row = {
                "score": name,
                "compensate": compensate,
                "seconds": time.perf_counter() - began,
                "cosine": 1 - float(objective.measure(made, judged, reference).mean()),
                "weights": saved(dense, units, kept),
                "linear": linear_weights(made) / linear_weights(dense),
            }
            print(row, flush=True)
            rows.append(row)
            thinner = made if name == FASTEST and compensate else thinner
    speed = []
    for size in BATCHES:
        batch = {name: value[:size] for name, value in tokens.items()}
        calls = {"dense": partial(dense, **batch), "cut": partial(thinner, **batch)}
        found = compare(calls, "dense", rounds=21 if size == 1 else 9, seconds=10)
        speed.append({"batch": size, **found})
        print(speed[-1], flush=True)
    return {"scores": rows, "speed": speed}


if __name__ == "__main__":
    main()
