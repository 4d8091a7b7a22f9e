"""How fast an artifact of a language model is read and decoded, beside its original in float32.

    python benchmarks/loading.py [ARTIFACT]

writes docs/results/loading.json. By default the artifact is the last that benchmarks/bench.py made of SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import torch
from common import CACHE, load_results, save_results, stat_bytes
from models import model_folder
from safetensors.torch import load_file

import octavo
from octavo.runtimes.packed.speed import interleaved

ROUNDS = 5


def read_original(folder: Path) -> None:
    """Read every weight: a mapped file that nobody touched is not loaded."""
    for file in folder.glob("*.safetensors"):
        for tensor in load_file(file).values():
            tensor.clone()


def main() -> None:
    """Measure and save."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else CACHE / "bench" / "smollm2" / "octavo" / "artifact"
    folder, artifact = model_folder("smollm2"), octavo.Artifact(path)
    weights = sum(tensor.numel() for tensor in artifact.state().values())
    seconds = interleaved(
        {"artifact": lambda: octavo.Artifact(path).state(), "original": lambda: read_original(folder)}, ROUNDS
    )
    forms = Counter(entry["form"]["form"] for entry in artifact.sites.values())
    row = {
        "bytes": stat_bytes(path),
        "weights": weights,
        "forms": dict(forms),
        "seconds": seconds,
        "weights_per_second": {name: weights / value for name, value in seconds.items()},
        "threads": torch.get_num_threads(),
    }
    results = load_results("loading")
    rows = [old for old in results.get("rows", []) if old["bytes"] != row["bytes"]]
    save_results("loading", {"model": "SmolLM2-135M-Instruct", "rows": [*rows, row]})
    print(row)


if __name__ == "__main__":
    main()
