"""A realistic report: a six-layer sentence encoder at a ratio of eight."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

import octavo
from octavo.allocation.profiles import Profile
from octavo.saving import Compressed, save_result

WIDTH, INNER, WORDS = 384, 1536, 30522


def _site(name: str, shape: list[int], kind: str, bits: float, loss: float, **more: Any) -> dict[str, Any]:
    parameters = shape[0] * shape[1]
    return {
        "name": name,
        "kind": kind,
        "shape": shape,
        "parameters": parameters,
        "method": "entropy",
        "family": "quantize",
        "setting": {"step": 0.31 / 2**bits},
        "bytes": round(parameters * bits / 8),
        "original_bytes": 4 * parameters,
        "bits_per_weight": bits,
        "expected_loss": loss,
        "form": "Grid",
        "tied": [],
    } | more


def _sites(layers: int) -> list[dict[str, Any]]:
    draw = random.Random(0)
    sites = [
        _site("embeddings.word_embeddings.weight", [WORDS, WIDTH], "embedding", 3.61, 7.1e-4),
        _site("embeddings.position_embeddings.weight", [512, WIDTH], "embedding", 2.9, 3.2e-6),
    ]
    parts = [(f"attention.self.{part}", [WIDTH, WIDTH]) for part in ("query", "key", "value")]
    parts += [
        ("attention.output.dense", [WIDTH, WIDTH]),
        ("intermediate.dense", [INNER, WIDTH]),
        ("output.dense", [WIDTH, INNER]),
    ]
    for layer in range(layers):
        for part, shape in parts:
            loss = 10 ** draw.uniform(-5.5, -3.9)
            site = _site(f"encoder.layer.{layer}.{part}.weight", shape, "linear", draw.uniform(3.1, 4.9), loss)
            if part.endswith("key") and layer % 2:
                site |= {"method": "svd", "family": "factorize", "setting": {"rank": 96, "bits": 6}, "form": "LowRank"}
            sites.append(site)
    return sites


def sample(layers: int = 6) -> dict[str, Any]:
    sites = _sites(layers)
    names = [(f"encoder.layer.{n}.{part}", [WIDTH]) for n in range(layers) for part in ("LayerNorm.weight", "bias")]
    kept = [
        {"name": name, "shape": shape, "bytes": 768, "original_bytes": 1536, "reason": "1-d tensor: stored as float16"}
        for name, shape in names
    ]
    kept.append(
        {
            "name": "pooler.dense.weight",
            "shape": [WIDTH, WIDTH],
            "bytes": 294912,
            "original_bytes": 589824,
            "reason": "never ran on the calibration text: stored as float16",
        }
    )
    families = {}
    for family in ("quantize", "factorize"):
        part = [site for site in sites if site["family"] == family]
        losses = sum(site["expected_loss"] for site in part)
        families[family] = {"sites": len(part), "bytes": sum(s["bytes"] for s in part), "expected_loss": losses}
    ratios = [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.05, 9.0, 10.0, 12.0, 14.0, 16.0]
    points = [
        {
            "ratio": r,
            "bytes": round(90872448 / r),
            "expected": 1.1e-5 * 2.55 ** (r - 2) if r < 9 else 0.0041 * 1.5 ** (r - 9),
            "measured": {4.0: 6.2e-5, 8.05: 0.0031, 12.0: 0.019}.get(r),
        }
        for r in ratios
    ]
    uniform = [
        {
            "method": method,
            "setting": f"bits={bits} group=64",
            "ratio": 31 / (bits + more),
            "bytes": round(90872448 * (bits + more) / 31),
            "expected": base * 4.2**-bits,
            "measured": 0.0042 if (method, bits) == ("entropy", 4) else None,
        }
        for method, more, base in (("rtn", 0.5, 4.1), ("gptq", 0.5, 2.4), ("entropy", -0.15, 1.2), ("vector", 0.1, 2.0))
        for bits in (2, 3, 4, 5, 6)
    ]
    return {
        "title": "all-MiniLM-L6-v2",
        "created": "2026-11-22T03:00:00Z",
        "octavo_version": "0.1.0",
        "command": "octavo compress sentence-transformers/all-MiniLM-L6-v2 --ratio 8 --out out/minilm --seed 0",
        "environment": {"python": "3.11.2", "torch": "2.13.0+cpu", "cpu_count": 2, "platform": "Linux-6.1-x86_64"},
        "seed": 0,
        "preset": "default",
        "source": {
            "path": "models/all-MiniLM-L6-v2",
            "fingerprint": "sha256:3c2f1e6a9d5b4788",
            "bytes": 90872448,
            "parameters": 22713216,
            "dtypes": {"float32": 22713216},
        },
        "budget": {"asked": "ratio 8", "bytes": 11359056},
        "artifact": {
            "bytes": 11290000,
            "ratio": 8.05,
            "used": 0.994,
            "files": {"model.safetensors": 11260000, "octavo.json": 30000},
            "bits_per_weight": 3.98,
            "note": "",
        },
        "quality": {
            "metric": "1 - cosine",
            "lower_is_better": True,
            "data": "64 held-back sentences of the built-in text",
            "value": 0.0031,
            "uniform": 0.0042,
            "p95": 0.006,
        },
        "latency": {
            "unit": "ms",
            "original": 12.1,
            "artifact": 12.3,
            "load_original": 30.0,
            "load_artifact": 55.0,
            "note": "median of 9 interleaved pairs",
        },
        "calibration": {
            "text": "built-in English text, 64 sentences",
            "sequences": 256,
            "tokens": 6100,
            "warnings": ["The calibration text is general English; a model for code needs its own."],
        },
        "winner": "mixed",
        "uniform": {"method": "entropy", "setting": {"step": 0.1}, "bytes": 11301234, "quality": 0.0042},
        "curve": {
            "points": points,
            "uniform": uniform,
            "chosen": {"ratio": 8.05, "bytes": 11290000, "quality": 0.0031},
        },
        "sites": sites,
        "kept": kept,
        "families": families,
        "unused": {
            "prune": {
                "sites": 36,
                "larger": 4,
                "exact": 1,
                "times": [1.2, 3.4],
                "nearest": "encoder.layer.0.output.dense.weight",
            },
            "share": {"sites": 2, "larger": 2, "exact": 0, "times": None, "nearest": None},
        },
        "code_lengths": {
            "bins": [n / 2 for n in range(17)],
            "weights": [0, 0, 9e3, 1.1e5, 6.2e5, 2.1e6, 5.3e6, 6.9e6, 4.4e6, 1.9e6, 8e5, 2.2e5, 4e4, 5e3, 0, 0],
        },
        "coding": {"huffman": 11000000, "bits": 230000, "raw": 30000, "ans": 0},
        "timings": {"evidence": 5.1, "profile": 20.0, "plan": 0.3, "encode": 8.0, "verify": 2.0, "total": 40.0},
        "peak_memory": 1.2e9,
    }


@pytest.fixture
def report() -> dict[str, Any]:
    return sample()


@pytest.fixture(scope="session")
def many() -> dict[str, Any]:
    return sample(layers=840)


class Explored(NamedTuple):
    """A source, its profile, and an artifact at a ratio of 6 that was solved from it."""

    source: Path
    profile: Path
    artifact: Path
    done: Compressed


@pytest.fixture(scope="session")
def explored(tmp_path_factory: pytest.TempPathFactory) -> Explored:
    folder = tmp_path_factory.mktemp("explored")
    source, profile, artifact = folder / "bare.safetensors", folder / "measured", folder / "folded"
    draw = torch.Generator().manual_seed(0)
    shapes = {"up.weight": (48, 32), "down.weight": (32, 48)}
    tensors = {
        f"layer.{layer}.{part}": torch.randn(shape, generator=draw) * 2.0**-layer
        for layer in range(13)
        for part, shape in shapes.items()
    }
    save_file({**tensors, "layer.0.bias": torch.ones(48)}, source)
    asked: dict[str, Any] = {"methods": ["entropy", "rtn"], "preset": "fast", "progress": False}
    found = octavo.profile(source, profile, **asked)
    # As measuring on a model would have found, so that what is shown is what was corrected.
    replace(found, correction={"linear 48x32": (1.3, 0.9)}).save(profile / "profile.json")
    assert {curve.group for curve in Profile.load(profile / "profile.json").curves} > {"linear 48x32"}
    done = octavo.compress(source, ratio=6, workspace=profile, resume=True, **asked)
    command = f"octavo compress {source} --ratio 6 --profile {profile} --out {artifact} --overwrite"
    save_result(done, artifact, command=command)
    return Explored(source, profile, artifact, done)
