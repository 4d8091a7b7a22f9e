"""Kinds of models that Octavo compresses: tiny modules of every kind of layer, and the groups of the zoo.

``python tests/architectures/kinds.py`` writes the tables of ``docs/model-kinds.md``; a test compares them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "model-kinds.md"
EXAMPLES, WIDTH = 48, 64


@dataclass(frozen=True)
class Kind:
    """A kind of layer: a module that has it, and a batch for the module.

    Parameters
    ----------
    layer
        What the table calls it.
    note
        How its weights are read.
    """

    name: str
    layer: str
    note: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Tensor]

    def module(self, seed: int = 0) -> nn.Module:
        """The module, the same at every call with the same seed."""
        torch.manual_seed(seed)
        return self.build().eval()


def drawn(*shape: int) -> Callable[[], Tensor]:
    """Makes the same random examples at every call."""
    return lambda: torch.randn(EXAMPLES, *shape, generator=torch.Generator().manual_seed(1))


class Pooled(nn.Module):
    """A convolution, then what the positions have in common, and a layer that reads it."""

    def __init__(self, convolution: nn.Module, channels: int = WIDTH) -> None:
        super().__init__()
        self.convolution, self.head = convolution, nn.Linear(channels, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.convolution(x).relu().flatten(2)[..., ::2].mean(2))


class Recurrent(nn.Module):
    """A recurrent layer, and a head on its last state."""

    def __init__(self, kind: type[nn.Module], *, width: int = WIDTH, **options: object) -> None:
        super().__init__()
        self.layer = kind(32, WIDTH, batch_first=True, **options)
        self.head = nn.Linear(width, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0].mean(1))


class Steps(nn.Module):
    """A recurrent cell that is called for every step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(32, WIDTH), nn.Linear(WIDTH, 32)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state)


class Attention(nn.Module):
    def __init__(self, other: int | None = None) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True, kdim=other, vdim=other)
        self.head = nn.Linear(WIDTH, 32)

    def forward(self, x: Tensor) -> Tensor:
        read = x[..., : self.attention.kdim]
        return self.head(self.attention(x, read, read, need_weights=False)[0].mean(1))


class Experts(nn.Module):
    """Four experts in one tensor, each with the inputs that a router gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 4)
        self.up, self.down = nn.Parameter(torch.randn(4, 48, WIDTH) / 8), nn.Parameter(torch.randn(4, 32, 48) / 7)

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = self.router(x).softmax(-1).max(-1)
        hidden = torch.einsum("ni,noi->no", x, self.up[chosen]).relu()
        return share[:, None] * torch.einsum("ni,noi->no", hidden, self.down[chosen])


class Twice(nn.Module):
    """Two matrices that meet in a product."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Bilinear(24, 24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(x, x.flip(1))


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


def layers(first: nn.Module) -> nn.Module:
    return nn.Sequential(first, nn.Tanh(), nn.Linear(WIDTH, 32))


def normed(layer: nn.Module, norm: Callable[[nn.Module], nn.Module] = parametrizations.weight_norm) -> nn.Module:
    return norm(layer)


def symmetric() -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layers(layer)


def recurrent_norm() -> nn.Module:
    model = Recurrent(nn.LSTM)
    parametrizations.weight_norm(model.layer, "weight_hh_l0")
    return model


CONV = "every output channel is a row"
UPWARD = "every output channel is a row, whatever the order in the tensor"
FLAT = "each flat weight is a site, with evidence from its gradient through time"
NORM = "the direction is a site; a plan that makes a norm zero is never chosen"
LINE, PLANE, SPACE, VECTOR = drawn(32, 14), drawn(32, 7, 7), drawn(16, 4, 4, 4), drawn(WIDTH)
SEQUENCE = drawn(6, 32)

KINDS = [
    Kind("conv1d", "`Conv1d`", CONV, lambda: Pooled(nn.Conv1d(32, WIDTH, 3)), LINE),
    Kind("conv2d", "`Conv2d`", CONV, lambda: Pooled(nn.Conv2d(32, WIDTH, 3, stride=2, padding=1)), PLANE),
    Kind("conv3d", "`Conv3d`", CONV, lambda: Pooled(nn.Conv3d(16, WIDTH, 3)), SPACE),
    Kind("dilated", "dilated", CONV, lambda: Pooled(nn.Conv2d(32, WIDTH, 3, padding="same", dilation=2)), PLANE),
    Kind("grouped", "grouped", CONV, lambda: Pooled(nn.Conv2d(32, WIDTH, 3, groups=4, padding_mode="circular", padding=1)), PLANE),
    Kind("depthwise", "depthwise and pointwise", CONV,
         lambda: Pooled(nn.Sequential(nn.Conv2d(32, WIDTH, 3, groups=32), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 1))), PLANE),
    Kind("transposed1d", "`ConvTranspose1d`", UPWARD, lambda: Pooled(nn.ConvTranspose1d(32, WIDTH, 4, 2)), LINE),
    Kind("transposed2d", "`ConvTranspose2d`, grouped", UPWARD,
         lambda: Pooled(nn.ConvTranspose2d(32, WIDTH, 3, stride=2, groups=2)), PLANE),
    Kind("transposed3d", "`ConvTranspose3d`", UPWARD, lambda: Pooled(nn.ConvTranspose3d(16, WIDTH, 2)), SPACE),
    Kind("lstm", "`LSTM`, two layers", FLAT, lambda: Recurrent(nn.LSTM, num_layers=2), SEQUENCE),
    Kind("lstm-both-ways", "`LSTM`, both ways, projected", FLAT,
         lambda: Recurrent(nn.LSTM, width=48, bidirectional=True, proj_size=24), SEQUENCE),
    Kind("gru", "`GRU`", FLAT, lambda: Recurrent(nn.GRU), SEQUENCE),
    Kind("rnn", "`RNN`", FLAT, lambda: Recurrent(nn.RNN), SEQUENCE),
    Kind("gru-cell", "`GRUCell` in a loop", FLAT, Steps, SEQUENCE),
    Kind("attention", "`MultiheadAttention`", "the packed `in_proj_weight` is one site", Attention, drawn(6, WIDTH)),
    Kind("attention-apart", "`MultiheadAttention` with `kdim`", "each projection is a site", lambda: Attention(48), drawn(6, WIDTH)),
    Kind("transformer", "`TransformerEncoder`", "as its layers",
         lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 4, 96, batch_first=True), 1), drawn(6, WIDTH)),
    Kind("experts", "experts in one tensor", "one site, with weights for every row of every expert", Experts, VECTOR),
    Kind("bilinear", "`Bilinear`", "one site of stacked matrices", Twice, drawn(24)),
    Kind("weight-norm", "`weight_norm`", NORM, lambda: layers(normed(nn.Linear(WIDTH, WIDTH))), VECTOR),
    Kind("weight-norm-hook", "`weight_norm`, as a hook", NORM, lambda: layers(normed(nn.Linear(WIDTH, WIDTH), weight_norm)), VECTOR),
    Kind("weight-norm-conv", "`weight_norm` of convolutions", NORM,
         lambda: Pooled(nn.Sequential(normed(nn.Conv1d(32, WIDTH, 3)), nn.ReLU(), normed(nn.ConvTranspose1d(WIDTH, 32, 4, 2))), 32), LINE),
    Kind("weight-norm-lstm", "`weight_norm` of an `LSTM`", NORM, recurrent_norm, SEQUENCE),
    Kind("spectral-norm", "`spectral_norm`", "the weight before the norm is a site",
         lambda: layers(normed(nn.Linear(WIDTH, WIDTH), parametrizations.spectral_norm)), VECTOR),
    Kind("spectral-norm-hook", "`spectral_norm`, as a hook", "the weight before the norm is a site",
         lambda: layers(normed(nn.Linear(WIDTH, WIDTH), spectral_norm)), VECTOR),
    Kind("orthogonal", "`orthogonal`", "the weight before the map is a site",
         lambda: layers(normed(nn.Linear(WIDTH, WIDTH), parametrizations.orthogonal)), VECTOR),
    Kind("parametrization", "a parametrization of your own", "the weight before the map is a site", symmetric, VECTOR),
]  # fmt: skip


class Guarded(nn.Module):
    """Divides by the norms of rows that have no other effect, so a row of zeros gives no number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat([torch.randn(60, WIDTH), 1e-4 * torch.randn(4, WIDTH)]))

    def forward(self, x: Tensor) -> Tensor:
        norms = self.weight[60:].detach().norm(dim=1)
        return F.linear(x, self.weight[:60]) * (norms / norms).prod()


@dataclass(frozen=True)
class Group:
    """A group of the zoo as a row of the table.

    Parameters
    ----------
    objectives
        What its quality may be measured by.
    """

    title: str
    objectives: tuple[str, ...]
    data: str
    note: str


GROUPS = {
    "encoder": Group("encoders", ("cosine", "kl", "squared"), "texts", ""),
    "decoder": Group("decoders", ("kl",), "texts", ""),
    "encoder-decoder": Group("encoder–decoders", ("kl", "cosine"), "texts", "the decoder gets the same text, one token later"),
    "mixture": Group(
        "mixtures of experts", ("kl",), "texts",
        "every expert in the files is a site with its own evidence; one that no token reached gets typical weights",
    ),
    "vision-language": Group(
        "vision–language models", ("kl",), "texts; folders of images", "towers that the data do not reach get typical weights"
    ),
    "vision": Group("vision models", ("kl", "cosine", "squared"), "folders of images", ""),
    "contrastive": Group("contrastive models", ("cosine",), "folders of images or sounds", "both sides count alike"),
    "speech": Group("speech models", ("kl", "cosine"), "folders of sounds", "a decoder gets texts, or what the model writes"),
    "state-space": Group("state-space models", ("kl",), "texts", ""),
}  # fmt: skip
METRICS = {"cosine": "1 − cosine", "kl": "KL", "squared": "squared error"}


def groups() -> Iterator[list[str]]:
    """Rows of the table of architectures."""
    for name, group in GROUPS.items():
        shown = [row for row in zoo.ZOO if row.group == name and not row.wide]
        others = sum(row.group == name for row in zoo.ZOO) - len(shown)
        generate = [row for row in shown if row.generates]
        classes = ", ".join(f"`{row.name}`" for row in shown) + (f" and {others} more" if others else "")
        generates = (
            "–" if not generate else "yes" if len(generate) == len(shown) else f"{len(generate)} of {len(shown)}"
        )
        metrics = ", ".join(METRICS[objective] for objective in group.objectives)
        yield [
            group.title,
            classes,
            "folder or module",
            "`from_pretrained`",
            metrics,
            generates,
            group.data,
            group.note,
        ]


@dataclass(frozen=True)
class Real:
    """A model from a package, whose figures are in ``docs/results/bench.json``."""

    title: str
    kind: str
    reload: str = "`from_pretrained`"


REAL = {
    "minilm": Real("all-MiniLM-L6-v2", "encoder"),
    "smollm2": Real("SmolLM2-135M-Instruct", "decoder, from GGUF"),
    "gemma": Real("Gemma 3 270M", "decoder, from GGUF"),
    "decoder": Real("a Llama trained for this", "decoder"),
    "whisper": Real("Whisper base", "speech, encoder–decoder"),
    "lite0": Real("EfficientNet-Lite0", "convolutions, a module", "`octavo.load(into=)`"),
}
RESULTS = ROOT / "docs" / "results" / "bench.json"


def real_models() -> Iterator[list[str]]:
    """Rows of the table of real models: every artifact of Octavo in the comparison with other tools."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))
    for name, real in REAL.items():
        for row in rows:
            if row["model"] != name or row["tool"] != "octavo" or row["quality"] is None:
                continue
            ratio = 32 / row["bits_per_weight"]
            second = "–" if row["second"] is None else f"{row['second_metric']} {row['second']:.3g}"
            generates = {None: "–", True: "yes", False: "no"}[row["generates"]]
            yield [
                real.title, real.kind, f"{ratio:.2f}", f"{row['bytes'] / 1e6:.2f} MB", f"{row['metric']} {row['quality']:.2g}",
                second, real.reload, generates,
            ]  # fmt: skip


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def tables() -> dict[str, str]:
    """The tables of the page by name."""
    layers = [[kind.layer, kind.note] for kind in KINDS]
    head = ["kind", "tested classes", "compress", "reload", "quality", "generate", "`--data`", "note"]
    figures = ["model", "kind", "ratio", "bytes", "quality", "in use", "reload", "generate"]
    return {
        "architectures": table(head, list(groups())),
        "layers": table(["layer", "how it is read"], layers),
        # A quantized source is kept at all ratios that allow it, which gives one row.
        "real": table(figures, [list(row) for row in dict.fromkeys(map(tuple, real_models()))]),
    }


def written(text: str) -> str:
    """The page with its tables made again."""
    for name, made in tables().items():
        text, count = re.subn(rf"(?s)(<!-- {name} -->\n).*?(\n<!-- end -->)", rf"\g<1>{made}\g<2>", text)
        if count != 1:
            sys.exit(f"{PAGE}: has {count} places for the table {name!r}")
    return text


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
