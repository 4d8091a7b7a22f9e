"""Real data of studies, from the folders of ``OCTAVO_DATA`` and from installed packages; tiny data for quick runs."""

from __future__ import annotations

import csv
import functools
import gzip
import hashlib
import importlib.util
import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from octavo.errors import MissingExtraError, RequestError
from octavo.sources.texts import builtin_texts

if TYPE_CHECKING:
    from octavo.recipes.frame.lab import Lab

#: Shown by the studies that use them; docs/adding-a-recipe.md says where to get each.
FASHION = "Fashion-MNIST, 70,000 images (Debian package dataset-fashion-mnist)"
CIFAR10 = "CIFAR-10 in JPEG, 50,000 training and 5,000 test images (cs.toronto.edu/~kriz/cifar.html)"
TEXT = "22 MB of English text made by benchmarks/corpus.py from public packages"
SST2 = "SST-2 (nlp.stanford.edu/sentiment)"
STSB = "STS benchmark, English (ixa2.si.ehu.eus/stswiki)"

Part = TypeVar("Part")
#: Where Debian packages put data.
_SYSTEM = ("/usr/share/datasets", "/usr/share/asterisk/sounds")
#: Of twenty pieces of text, these are for choices and for reporting.
_DEVELOPMENT, _TEST = (9,), (4, 14)


@dataclass(frozen=True)
class Parts(Generic[Part]):
    """Data for training, for choices and for reporting.

    Parameters
    ----------
    train, development, test
        Choices use ``development``, and reports use ``test``.
    digest
        SHA-256 of the content, which caches of bases are keyed by.
    """

    train: Part
    development: Part
    test: Part
    digest: str


@dataclass(frozen=True)
class Split(Parts[tuple[Tensor, Tensor]]):
    """Examples, such as images (N, channels, H, W), and their labels (N,)."""

    classes: int = 10


def file(name: str) -> Path:
    """A file or folder of that name, from the first folder of ``OCTAVO_DATA`` that has it.

    Raises
    ------
    RequestError
        If none has it.
    """
    given = os.environ.get("OCTAVO_DATA", "../shared/data")
    for folder in (*given.split(os.pathsep), *_SYSTEM):
        if (Path(folder) / name).exists():
            return Path(folder) / name
    raise RequestError(
        f"OCTAVO_DATA: no folder of {given!r} holds {name}; docs/adding-a-recipe.md says where to get it, or run with "
        "--quick"
    )


def package_folder(module: str, install: str) -> Path:
    """Folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(f"the package {module} is not installed: {install}")
    return Path(next(iter(spec.submodule_search_locations)))


def fashion(lab: Lab, train: int | None = None) -> Split:
    """Fashion-MNIST, (N, 1, 28, 28): 55,000 training, 5,000 development and 10,000 test images.

    Parameters
    ----------
    train
        How many of the training images; all by default. Quick runs have few of scikit-learn's digits instead.
    """
    return _digits() if lab.quick else _few(_fashion(), train)


def cifar10(lab: Lab, train: int | None = None) -> Split:
    """CIFAR-10, (N, 3, 32, 32): 48,000 training, 2,000 development and all test images; else as :func:`fashion`."""
    return _digits() if lab.quick else _few(_cifar10(), train)


@functools.cache
def _digits() -> Split:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("quick runs need scikit-learn: pip install 'octavo[recipes]'") from error
    found = load_digits()
    pixels = np.kron(found.images, np.ones((2, 2)))[:, None].astype(np.uint8)
    labels = [found.target[:768], found.target[768:1280]]
    return _split([pixels[:768], pixels[768:1280]], labels, 256, (8.0,), (8.0,), digest(pixels.tobytes()))


@functools.cache
def _fashion() -> Split:
    names = ("train-images-idx3", "t10k-images-idx3", "train-labels-idx1", "t10k-labels-idx1")
    parts = [gzip.decompress(file(f"fashion-mnist/{name}-ubyte.gz").read_bytes()) for name in names]
    pixels = [np.frombuffer(part, np.uint8, offset=16).reshape(-1, 1, 28, 28) for part in parts[:2]]
    labels = [np.frombuffer(part, np.uint8, offset=8) for part in parts[2:]]
    return _split(pixels, labels, 5_000, (72.9,), (90.0,), digest(*parts))


@functools.cache
def _cifar10() -> Split:
    try:
        folder = file("cifar-10-batches-bin")
    except RequestError:
        files = [file(f"cifar10-{part}.npz") for part in ("train", "test")]
        pixels, labels = zip(*map(_jpeg, files), strict=True)
    else:
        # As its authors give it: a byte of label and 3 x 32 x 32 of colours each.
        files = [folder / f"{name}.bin" for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch")]
        rows = [np.fromfile(path, np.uint8).reshape(-1, 1 + 3 * 32 * 32) for path in files]
        rows = [np.concatenate(rows[:-1]), rows[-1]]
        pixels, labels = [row[:, 1:].reshape(-1, 3, 32, 32) for row in rows], [row[:, 0] for row in rows]
    # Of the files, since decoders of JPEG may differ in a bit.
    made = digest(*(path.read_bytes() for path in files))
    return _split(pixels, labels, 2_000, (125.3, 123.0, 113.9), (63.0, 62.1, 66.7), made)


def _jpeg(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("CIFAR-10 in JPEG needs Pillow: pip install 'octavo[recipes]'") from error
    with np.load(path) as found:
        content, ends, labels = found["jpeg"].tobytes(), found["offsets"].tolist(), found["labels"]
    pictures = [np.asarray(Image.open(io.BytesIO(content[a:b])).convert("RGB")) for a, b in pairwise(ends)]
    return np.stack(pictures).transpose(0, 3, 1, 2), labels


def _split(
    pixels: Iterable[np.ndarray], labels: Iterable[np.ndarray], development: int,
    mean: tuple[float, ...], deviation: tuple[float, ...], made: str,
) -> Split:  # fmt: skip
    """Training and test images; the last training images are for choices."""
    shift, scale = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, deviation))
    x, test = ((torch.tensor(array).float() - shift) / scale for array in pixels)
    y, truth = (torch.tensor(array).long() for array in labels)
    count = len(x) - development
    return Split((x[:count], y[:count]), (x[count:], y[count:]), (test, truth), made)


def _few(split: Split, train: int | None) -> Split:
    if train is None:
        return split
    x, y = split.train
    return Split((x[:train], y[:train]), split.development, split.test, digest(f"{split.digest} {train}".encode()))


def texts(lab: Lab) -> Parts[str]:
    """Running text, 85/5/10: the files ``text/*.txt`` of ``OCTAVO_DATA``; in quick runs the built-in sentences.

    Every file is cut at ends of lines into pieces of about 50,000 characters, and pieces are dealt to the parts in
    turn, so that all parts have all kinds of text.
    """
    if lab.quick:
        whole, size = ["\n".join(builtin_texts())], 1_000
    else:
        whole, size = [path.read_text(encoding="utf-8") for path in sorted(file("text").glob("*.txt"))], 50_000
    train, development, test = "", "", ""
    for text in whole:
        for number, piece in enumerate(_pieces(text, size)):
            if number % 20 in _TEST:
                test += piece
            elif number % 20 in _DEVELOPMENT:
                development += piece
            else:
                train += piece
    return Parts(train, development, test, digest(*(text.encode() for text in whole)))


def _pieces(text: str, size: int) -> Iterator[str]:
    lines: list[str] = []
    for line in text.splitlines(keepends=True):
        lines.append(line)
        if sum(map(len, lines)) >= size:
            yield "".join(lines)
            lines = []
    yield "".join(lines)


def sentiment(lab: Lab) -> Parts[list[tuple[str, int]]]:
    """SST-2's sentences with their label, 0 or 1; its development file is the test part here.

    In quick runs sentences of the built-in text, whose label is whether they have more than twelve words.
    """
    if lab.quick:
        lines = [(text, int(len(text.split()) > 12)) for text in builtin_texts()]
        return _listed(lines[:192], 32, lines[192:256])
    learn, shown = (
        [(row.rsplit("\t", 1)[0], int(row.rsplit("\t", 1)[1])) for row in path.read_text("utf-8").splitlines() if row]
        for path in (file("sst2-train.tsv"), file("sst2-dev.tsv"))
    )
    return _listed(learn, 692, shown)


def origins(lab: Lab, words: int = 16, vocabulary: int = 4096, each: int = 4_000) -> Split:
    """Passages as numbers of words, (N, words), and the number of the text that each is from.

    Every file of :func:`texts` gives as many passages, spread over all of it; a tenth is for choices, and a fifth for
    reporting. Words are numbered by falling frequency; 0 fills up, 1 is any word beyond the vocabulary. Quick runs have
    the sentences of :func:`sentiment`.
    """
    parts: list[list[tuple[str, int]]] = [[], [], []]
    if lab.quick:
        found = sentiment(lab)
        parts, made = [found.train, found.development, found.test], found.digest
    else:
        content = [path.read_bytes() for path in sorted(file("text").glob("*.txt"))]
        made = digest(*content)
        for label, text in enumerate(content):
            all_words = text.decode().split()
            step = max(1, len(all_words) // words // each) * words
            for number, start in enumerate(range(0, min(len(all_words) - words, each * step), step)):
                # Neighbours go to the same part.
                part = parts[{0: 1, 1: 2, 2: 2}.get(number // 20 % 10, 0)]
                part.append((" ".join(all_words[start : start + words]), label))
    counts = Counter(word for passage, _ in parts[0] for word in passage.lower().split())
    known = {word: number for number, (word, _) in enumerate(counts.most_common(vocabulary - 2), start=2)}

    def numbered(rows: list[tuple[str, int]]) -> tuple[Tensor, Tensor]:
        ids = [[known.get(word, 1) for word in passage.lower().split()][:words] for passage, _ in rows]
        return torch.tensor([row + [0] * (words - len(row)) for row in ids]), torch.tensor([y for _, y in rows])

    train, development, test = (numbered(part) for part in parts)
    return Split(train, development, test, made, int(train[1].max()) + 1)


def likeness(lab: Lab) -> Parts[list[tuple[str, str, float]]]:
    """The STS benchmark: pairs of sentences and their likeness, 0 to 5; its development file is the test part here.

    In quick runs neighbours in the built-in text, compared by the words they share.
    """
    if lab.quick:
        lines = builtin_texts()[:65]
        pairs = [(a, b, float(len({*a.split()} & {*b.split()}))) for a, b in pairwise(lines)]
        return _listed(pairs[:48], 16, pairs[48:])
    learn, shown = (
        [(a, b, float(score)) for a, b, score in csv.reader(path.read_text("utf-8").splitlines())]
        for path in (file("stsb-train.csv"), file("stsb-dev.csv"))
    )
    return _listed(learn, 500, shown)


Row = TypeVar("Row")


def _listed(learn: list[Row], development: int, test: list[Row]) -> Parts[list[Row]]:
    count = len(learn) - development
    return Parts(learn[:count], learn[count:], test, digest(repr((learn, test)).encode()))


def digest(*content: bytes) -> str:
    """SHA-256 of parts and their lengths."""
    found = hashlib.sha256()
    for part in content:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()
