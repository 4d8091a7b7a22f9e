"""Honest artifacts of a few kB each, which between them hold every form, codec, dtype, layout and kind of folder."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

import octavo
from fuzzing.gallery import MAKERS, Gallery
from octavo import coding, forms
from octavo.artifact import pack, writing
from octavo.artifact.writing import Contents, Entry, Kept
from octavo.coding.container import CHUNK
from octavo.sources.modules import SUPPORTED
from octavo.sources.sites import Layout

WORDS = [
    "the",
    "of",
    "and",
    "in",
    "is",
    "it",
    "he",
    "was",
    "one",
    "two",
    "red",
    "old",
    "big",
    "sun",
    "sea",
    "ship",
    "king",
]
#: Shapes of weights with the layouts that read them as matrices of 12 x 24, or near it.
LAYOUTS: list[tuple[tuple[int, ...], Layout]] = [
    ((12, 24), Layout()),
    ((12, 6, 2, 2), Layout()),
    ((24, 12), Layout("columns_first")),
    ((8, 6, 2, 3), Layout("transposed", 2)),
    ((2, 6, 24), Layout("stacked")),
    ((12, 24), Layout("rows_first", 1, -70)),
]


@dataclass(frozen=True)
class Seed:
    """An honest artifact.

    Parameters
    ----------
    name
        What it is called in tables.
    folder
        Where it lies.
    views
        Ways in which it is loaded besides reading all of its tensors.
    """

    name: str
    folder: Path
    views: tuple[str, ...] = ("inspect", "packed", "load", "verify")


def write_seeds(root: Path) -> list[Seed]:
    """All seeds, written below a folder."""
    bare = {
        **{kind: lambda kind=kind: of_form(kind) for kind in MAKERS},
        "codecs": codecs,
        "kept": kept,
        "aliases": aliases,
    }
    seeds = []
    for name, make in bare.items():
        seeds.append(Seed(name, _written(make(), root / name)))
    seeds.append(Seed("memory", _written(_resident(of_form("grid")), root / "memory")))
    with mock.patch.object(writing, "SHARD_BYTES", 500):
        seeds.append(Seed("shards", _written(aliases(), root / "shards")))
    return [*seeds, *_models(root)]


def _written(contents: Contents, folder: Path) -> Path:
    folder.mkdir()
    contents.write(folder)
    return folder


def _contents(entries: dict[str, Entry], kept: dict[str, Kept], **more: object) -> Contents:
    source = {"title": "seed", "fingerprint": "0" * 64, "bytes": 100_000, "weights": 25_000}
    return Contents(source, entries, kept, **more)  # type: ignore[arg-type]


def _kept(tensor: Tensor, stored: torch.dtype | None = None, coded: bool = False) -> Kept:
    return Kept(lambda: tensor, tuple(tensor.shape), stored or tensor.dtype, tensor.dtype, coded)


def of_form(kind: str) -> Contents:
    """A site of each layout, all of one form that holds others."""
    gallery, entries = Gallery(list(MAKERS).index(kind)), {}
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
    for number, (shape, layout) in enumerate(LAYOUTS):
        packed = pack(gallery.form(kind, *layout.matrix_shape(shape)))
        entries[f"layer.{number}.weight"] = Entry(packed, shape, dtypes[number % len(dtypes)], layout)
    return _contents(entries, {"layer.0.bias": _kept(gallery.floats(12))})


def codecs() -> Contents:
    """Integers of every dtype, coded in every way, and a matrix in streams."""
    g = Gallery(100)
    wide = (g.floats(140, 120) * torch.exp(g.floats(140, 1)) * 9).round()
    wide[3, 4] = 30000
    tensors = {
        "raw": g.integers(-128, 128, 60),
        "bits": g.integers(0, 5, 6, 10) > 3,
        "ans": wide.to(torch.int16),
        "huffman": (g.floats(600, 120) * 3).round().to(torch.int32),
        "constant": torch.full((CHUNK + 5,), 7, dtype=torch.int64),
        "uint8": g.integers(0, 9, 40, dtype=torch.uint8),
        "int64": g.integers(-(2**60), 2**60, 9, dtype=torch.int64),
        "scalar": torch.tensor(5),
        "empty": torch.zeros(0, 3, dtype=torch.int32),
    }
    entries = {"weight": Entry(pack(g.form("grid", 140, 120)), (140, 120), torch.float32, Layout())}
    return _contents(entries, {name: _kept(tensor) for name, tensor in tensors.items()})


def kept() -> Contents:
    """A tensor of every dtype, as itself or as its bits."""
    g, found = Gallery(101), {}
    for dtype in sorted(SUPPORTED, key=str):
        name = str(dtype).removeprefix("torch.")
        size = dtype.itemsize
        # Any bits are a number, but for truth values.
        bits = g.integers(0, 2 if dtype == torch.bool else 60, 6 * size, dtype=torch.uint8)
        found[name] = _kept(bits.view(dtype).reshape(2, 3))
    found["narrow"] = _kept(g.floats(7), torch.float16)
    found["constant"] = _kept(torch.full((50,), 3.0), coded=True)
    found["odd \u2028 name."] = _kept(g.floats(2))
    found["__metadata__"] = _kept(g.floats(3))
    entries = {"weight": Entry(pack(g.form("dense", 12, 24)), (12, 24), torch.float32, Layout())}
    return _contents(entries, found)


def aliases() -> Contents:
    """Tied tensors, some of which stand in the file, tensors of sub-folders, and data beside tensors."""
    g = Gallery(102)
    names = ("one.weight", "two.weight", "2_Dense/linear.weight", "3_Dense/linear.weight")
    kinds = ("grid", "lowrank", "sparse", "dense")
    entries = {
        name: Entry(pack(g.form(kind, 24, 16)), (24, 16), torch.float32, Layout())
        for name, kind in zip(names, kinds, strict=True)
    }
    found = {
        "one.bias": _kept(g.floats(24)),
        "2_Dense/linear.bias": _kept(g.floats(24)),
        "steps": _kept(torch.arange(5)),
    }
    tied = {"tied.weight": "one.weight", "head.weight": "two.weight", "head.bias": "one.bias"}
    extra = {"head._extra_state": {"scale": 2.5, "names": ["a", None, True], "deep": {"x": [1, 2]}}}
    return _contents(entries, found, aliases=tied, named=frozenset({"head.weight"}), extra=extra)


def _resident(contents: Contents) -> Contents:
    contents.resident = 50_000
    return contents


def _models(root: Path) -> list[Seed]:
    """Folders that ``transformers`` and ``sentence-transformers`` load, written by the way through."""
    bert, encoder = _bert(root / "bert-source"), _encoder(root / "bert-source", root / "encoder-source")
    views = ("inspect", "verify", "load", "auto", "auto", "packed")
    # Quality is not what is looked at: a method of each family, and no data. Pictures are for people.
    options = {"methods": ["entropy", "svd", "rtn", "keep"], "preset": "data-free", "ratio": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        octavo.compress(bert, **options).save(root / "bert")
        with mock.patch.object(writing, "SHARD_BYTES", 2500):
            octavo.compress(bert, **options).save(root / "bert-shards")
        octavo.compress(bert, ratio=1.5, target="memory", preset="data-free").save(root / "bert-memory")
        octavo.compress(encoder, **options).save(root / "encoder")
    names = {"bert": views, "bert-shards": views, "bert-memory": views, "encoder": (*views, "sentences", "sentences")}
    return [Seed(name, root / name, own) for name, own in names.items()]


def _bert(folder: Path) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = Tokenizer(WordPiece({word: k for k, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=32, max_position_embeddings=32, **sizes)).eval().save_pretrained(folder)
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **special).save_pretrained(folder)
    return folder


def _encoder(bert: Path, folder: Path) -> Path:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers import models as parts

    transformer = parts.Transformer(str(bert), max_seq_length=32)
    torch.manual_seed(1)
    dense = parts.Dense(24, 32, activation_function=nn.Tanh())
    SentenceTransformer(modules=[transformer, parts.Pooling(24), dense], device="cpu").save(str(folder))
    return folder


def covered(seeds: list[Seed]) -> tuple[set[str], set[str]]:
    """Forms and codecs that the seeds hold between them."""
    kinds, used = set[str](), set[str]()

    def walk(meta: object) -> None:
        if isinstance(meta, dict):
            kinds.update([meta["form"]] if "form" in meta else [])
            for value in meta.values():
                walk(value)

    for seed in seeds:
        artifact = octavo.Artifact(seed.folder)
        for name, entry in artifact.sites.items():
            walk(entry["form"])
            content = artifact.content(name)
            parts = [part for part in entry["parts"].values() if len(part) == 2]
            used.update(coding.describe(content[start : start + length]).codec for start, length in parts)
        used.update(coding.describe(artifact.content(name)).codec for name in artifact.coded)
    return kinds, used


def check_coverage(seeds: list[Seed]) -> None:
    """Raise unless every registered form and codec is in a seed."""
    from octavo.coding.container import CODECS

    kinds, used = covered(seeds)
    missing = sorted({*forms.form_names(), *CODECS} - kinds - used)
    if missing:
        raise AssertionError(
            f"no seed of the fuzzer holds {', '.join(missing)}: add it to benchmarks/fuzzing/gallery.py"
        )
