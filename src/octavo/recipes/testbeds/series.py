"""Real time series of several channels, and a small transformer that classifies them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from octavo.recipes.frame.data import Split, digest, package_folder

if TYPE_CHECKING:
    from octavo.recipes.frame.lab import Lab

#: Shown by the studies that use it.
VOWELS = "JapaneseVowels, 640 utterances of 9 speakers (pip install --no-deps aeon; timeseriesclassification.com)"
#: Utterances of the training part that are for choices: every so many.
_EVERY = 5


def vowels(lab: Lab) -> Split:
    """Utterances (N, 12, 29) of 9 speakers: 216 to train, 54 for choices, 370 for the test; in quick runs waves."""
    if lab.quick:
        return _waves()
    folder = package_folder("aeon", "pip install --no-deps aeon") / "datasets" / "data" / "JapaneseVowels"
    (x, y), test = (_read(folder / f"JapaneseVowels_eq_{part}.ts") for part in ("TRAIN", "TEST"))
    mean, deviation = x.mean((0, 2), keepdim=True), x.std((0, 2), keepdim=True)
    chosen = torch.arange(len(x)) % _EVERY == 0
    x, unseen = (x - mean) / deviation, (test[0] - mean) / deviation
    made = digest(x.numpy().tobytes(), unseen.numpy().tobytes())
    return Split((x[~chosen], y[~chosen]), (x[chosen], y[chosen]), (unseen, test[1]), made, classes=9)


def _read(path: Path) -> tuple[Tensor, Tensor]:
    """Series (N, channels, times) and classes from 0, from a file of sktime's format; missing values are 0."""
    _, _, body = path.read_text(encoding="utf-8").lower().partition("@data\n")
    rows = [line.split(":") for line in body.splitlines() if line.strip()]
    values = [[[float(v) if v != "?" else 0.0 for v in part.split(",")] for part in row[:-1]] for row in rows]
    names = sorted({row[-1] for row in rows})
    return torch.tensor(values).nan_to_num(), torch.tensor([names.index(row[-1]) for row in rows])


def _waves() -> Split:
    """Sines of three frequencies in noise."""
    draws = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (192,), generator=draws)
    phase = 6.28 * torch.rand(192, 4, 1, generator=draws)
    x = torch.sin((y[:, None, None] + 1) * torch.arange(16) * 0.4 + phase)
    x = x + 0.5 * torch.randn(x.shape, generator=draws)
    train, development, test = ((x[a:b], y[a:b]) for a, b in ((0, 96), (96, 128), (128, 192)))
    return Split(train, development, test, digest(x.numpy().tobytes()), classes=3)


class SeriesTransformer(nn.Module):
    """A convolution of kernel 1, learned positions, one transformer block, a mean over time, and a linear head.

    Parameters
    ----------
    channels, times
        Of a series.
    width
        Elements of a position; the block has four heads and four times as many hidden elements.
    """

    def __init__(self, channels: int, times: int, classes: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Conv1d(channels, width, 1)
        self.positions = nn.Parameter(0.02 * torch.randn(times, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.inputs, self.outputs = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Series (N, channels, times) to logits (N, classes)."""
        x = self.embed(x).transpose(1, 2) + self.positions
        q, k, v = (part.unflatten(2, (4, -1)).transpose(1, 2) for part in self.inputs(self.norms[0](x)).chunk(3, 2))
        x = x + self.outputs(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(functional.gelu(self.up(self.norms[1](x))))
        return self.head(self.norms[2](x).mean(1))
