"""Sources and artifacts, all tiny and all real, and the ways in which Octavo is asked: as Python and as a command."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import octavo
from octavo.cli import app

LETTERS = [chr(ord("a") + k) for k in range(26)]
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


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Net(nn.Module):
    """A convolution, a norm and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 3, padding=1)
        self.norm = nn.BatchNorm2d(24)
        self.head = nn.Linear(24, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def write_bert(folder: Path, *, layers: int = 2, hidden: int = 32, seed: int = 0) -> Path:
    """A BERT with random weights and its tokenizer, as ``save_pretrained`` leaves them."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS), *WORDS]
    tokenizer = Tokenizer(WordPiece({word: k for k, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=120, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=2 * hidden, max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).eval().save_pretrained(folder)
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **special).save_pretrained(folder)
    return folder


def write_texts(file: Path, count: int = 48, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    lines = [" ".join(WORDS[k] for k in torch.randint(0, len(WORDS), (8,), generator=generator)) for _ in range(count)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def write_bare(file: Path, seed: int = 0, **more: torch.Tensor) -> Path:
    """A file of tensors without a model."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "first.weight": torch.randn(64, 48, generator=generator),
        "second.weight": torch.randn(96, 64, generator=generator),
        "second.bias": torch.randn(96, generator=generator),
        "steps": torch.arange(5),
    }
    save_file({**tensors, **more}, file)
    return file


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("source") / "bert")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("data") / "texts.txt")


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bare(tmp_path_factory.mktemp("bare") / "bare.safetensors")


@pytest.fixture(scope="session")
def artifact(bert: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of the BERT. Tests damage copies of it."""
    out = tmp_path_factory.mktemp("artifact") / "folded"
    octavo.compress(bert, ratio=3, data=texts, preset="fast", methods=["entropy", "svd", "rtn", "keep"]).save(out)
    return out


class Zoo(nn.Module):
    """A layer for every form, layout and kind of entry that a manifest can hold."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("grid", "codebook", "dense", "mask", "pattern", "product", "sum"):
            setattr(self, name, nn.Linear(64, 24, bias=False))
        self.transposed = nn.ConvTranspose2d(16, 12, 3, groups=2)
        self.norm = nn.BatchNorm1d(24)
        self.tied = nn.Linear(64, 24, bias=False)
        self.tied.weight = self.grid.weight


@pytest.fixture(scope="session")
def zoo_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of the zoo."""
    out = tmp_path_factory.mktemp("artifact") / "zoo"
    torch.manual_seed(0)
    keep = {
        "grid.*": "rtn:bits=4,group=16",
        "codebook.*": "kmeans:values=8",
        "dense.*": "bfloat16",
        "mask.*": "magnitude:sparsity=0.8,bits=4",
        "pattern.*": "wanda:pattern=4:8,bits=3",
        "product.*": "svd:rank=5,bits=4",
        "sum.*": "eora:step=0.5,rank=4,bits=4",
        "transposed.*": "entropy:step=0.1",
    }
    octavo.compress(Zoo().eval(), ratio=2, keep=keep).save(out)
    return out


@dataclass
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """Its error message, the line breaks of a narrow terminal undone."""
        return " ".join(self.err.split())


@pytest.fixture
def command() -> Callable[..., Result]:
    """Run a command in this process; an exception that would be a traceback is a failure."""

    def run(*words: object) -> Result:
        result = CliRunner().invoke(app, [str(word) for word in words])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Result(result.exit_code, result.stdout, result.stderr)

    return run


def environment() -> dict[str, str]:
    source = str(Path(octavo.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "1000"}


def arguments(*words: object) -> list[str]:
    """The command line of a process of its own."""
    return [sys.executable, "-c", "from octavo.cli import main; main()", *map(str, words)]


def spawn(*words: object, **options: Any) -> Result:
    """Run a command in a process of its own."""
    done = subprocess.run(arguments(*words), env=environment(), capture_output=True, text=True, timeout=120, **options)
    return Result(done.returncode, done.stdout, done.stderr)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below, hidden ones too, with contents."""
    every = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in every}


@pytest.fixture
def refused(command: Callable[..., Result], tmp_path: Path) -> Callable[..., Result]:
    """Run ``octavo compress`` that must be refused: exit code, one clear error, and nothing left behind."""

    def run(*words: object, code: int = 2, says: str = "", out: Path | None = None) -> Result:
        target = out or tmp_path / "out"
        before = tree(target.parent) if target.parent.is_dir() else {}
        result = command("compress", *words, "--out", target)
        assert result.code == code, f"exit code {result.code}: {result.out}{result.err}"
        assert result.err.startswith(("error: ", "Usage: ")), result.err
        assert "Traceback" not in result.err
        assert says in result.said, result.said
        assert (tree(target.parent) if target.parent.is_dir() else {}) == before
        return result

    return run


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact, without its signature."""
    manifest = json.loads((folder / "octavo.json").read_text())
    del manifest["sha256"]
    return manifest


@dataclass(frozen=True)
class Lab:
    """The tools above, for tests, which cannot import from here."""

    net: Callable[[], Net] = net
    write_bert: Callable[..., Path] = write_bert
    write_bare: Callable[..., Path] = write_bare
    write_texts: Callable[..., Path] = write_texts
    tree: Callable[[Path], dict[str, bytes | None]] = tree
    environment: Callable[[], dict[str, str]] = environment
    arguments: Callable[..., list[str]] = arguments
    spawn: Callable[..., Result] = spawn
    manifest_of: Callable[[Path], dict[str, Any]] = manifest_of


@pytest.fixture(scope="session")
def lab() -> Lab:
    return Lab()
