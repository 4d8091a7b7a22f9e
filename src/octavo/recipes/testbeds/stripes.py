"""What crosses a split network: features forward and their gradients back, each coded to real bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from octavo import coding

#: Steps between two groupings of channels, and stripes that codebooks are fitted to in a step.
REFRESH, FITTED = 50, 4096


class Boundary(ABC):
    """One direction of a link; it counts the bytes of everything that its receiver needs."""

    bytes: int = 0

    @abstractmethod
    def carried(self, sent: Tensor) -> Tensor:
        """What arrives of a tensor (N, channels, height, width)."""


@dataclass
class Plain(Boundary):
    """Float32."""

    def carried(self, sent: Tensor) -> Tensor:  # noqa: D102
        self.bytes += sent.nbytes
        return sent


@dataclass
class Uniform(Boundary):
    """Evenly spaced values from the least to the largest, entropy-coded."""

    bits: int

    def carried(self, sent: Tensor) -> Tensor:  # noqa: D102
        low, high = sent.aminmax()
        step = ((high - low) / (2**self.bits - 1)).clamp_min(1e-30)
        codes = ((sent - low) / step).round().to(torch.uint8)
        blob = coding.encode(codes)
        self.bytes += len(blob) + 8
        return coding.decode(blob).to(sent.dtype) * step + low


@dataclass
class Stripes(Boundary):
    """Groups of channels; a stripe is the vector of a group at one pixel, and is sent as the nearest of a codebook.

    Every group has a codebook of its own, fitted by one round of Lloyd's algorithm in every step, from that of the step
    before. Codebooks are sent in 16 bits with every batch, and the order of channels when it changes. Channels are
    standardized by a scale for each group. This is our realization: the abstract of the source has no formulas.

    Parameters
    ----------
    bits
        Logarithm of the codewords of a group.
    size
        Channels of a group; 1 makes it a scalar codebook for each channel.
    similar
        Whether correlated channels share a group; otherwise groups are drawn at random.
    """

    bits: int = 4
    size: int = 4
    similar: bool = True
    steps: int = 0
    order: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    books: Tensor = field(default_factory=lambda: torch.zeros(0))

    def carried(self, sent: Tensor) -> Tensor:  # noqa: D102
        count, channels, height, width = sent.shape
        flat = sent.transpose(0, 1).reshape(channels, -1)
        if self.steps % REFRESH == 0:
            self._regroup(flat)
        stripes = flat[self.order].view(-1, self.size, flat.shape[1]).transpose(1, 2)
        scale = stripes.square().mean((1, 2), keepdim=True).sqrt().clamp_min(1e-12)
        # A receiver has scales in 32 bits, and codebooks in 16.
        stripes = stripes / scale
        if not len(self.books):
            picked = torch.randperm(stripes.shape[1], generator=torch.Generator().manual_seed(0))[: 2**self.bits]
            self.books = stripes[:, picked].clone()
        self._fit(stripes)
        books = self.books.half().float()
        codes = torch.cdist(stripes, books).argmin(2).to(torch.uint8)
        blob = coding.encode(codes)
        self.bytes += len(blob) + 2 * books.numel() + 4 * len(scale)
        self.steps += 1
        read = coding.decode(blob).long()
        found = torch.gather(books, 1, read[..., None].expand(-1, -1, self.size)) * scale
        rows = torch.empty_like(flat)
        rows[self.order] = found.transpose(1, 2).reshape(channels, -1)
        return rows.view(channels, count, height, width).transpose(0, 1)

    def _regroup(self, flat: Tensor) -> None:
        """Choose groups; codebooks begin again where they changed."""
        channels = len(flat)
        if self.similar:
            order = grouped(torch.corrcoef(flat).nan_to_num().abs(), self.size)
        else:
            order = torch.randperm(channels, generator=torch.Generator().manual_seed(0))
        if not torch.equal(order, self.order):
            self.order, self.books = order, torch.zeros(0)
            # A byte says which channel comes next.
            self.bytes += channels

    def _fit(self, stripes: Tensor) -> None:
        """One round of Lloyd's algorithm on stripes spread over the batch; codewords without stripes stay."""
        part = stripes[:, :: -(-stripes.shape[1] // FITTED)]
        nearest = nn.functional.one_hot(torch.cdist(part, self.books).argmin(2), self.books.shape[1]).float()
        counts = nearest.sum(1)[..., None]
        self.books = torch.where(counts > 0, nearest.transpose(1, 2) @ part / counts.clamp_min(1), self.books)


def grouped(similarity: Tensor, size: int) -> Tensor:
    """The order of channels in which each group is a channel and those most similar to it, (channels,)."""
    left, order = set(range(len(similarity))), list[int]()
    while left:
        first = min(left)
        near = sorted(left - {first}, key=lambda other: -float(similarity[first, other]))[: size - 1]
        order += [first, *near]
        left -= {first, *near}
    return torch.tensor(order)


class SplitNet(nn.Module):
    """A net in two parts, with a link between them that works in training.

    Parameters
    ----------
    device, server
        The parts.
    opened
        Returns a boundary: one is for features, another for their gradients.
    """

    def __init__(self, device: nn.Module, server: nn.Module, opened: Callable[[], Boundary]) -> None:
        super().__init__()
        self.device, self.server = device, server
        self.up, self.down = opened(), opened()

    def forward(self, x: Tensor) -> Tensor:
        """Inputs to outputs."""
        features = self.device(x)
        return self.server(_Crossing.apply(features, self.up, self.down) if self.training else features)


class _Crossing(torch.autograd.Function):
    """The straight-through link."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, up: Boundary, down: Boundary) -> Tensor:
        ctx.down = down
        return up.carried(features.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.down.carried(gradients[0]), None, None
