"""Nets so small that their influence functions can be solved exactly, and images for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def small_images(pair: tuple[Tensor, Tensor], count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Some images, drawn by the seed and averaged to (count, channels, 8, 8), float64, with their labels."""
    which = torch.randperm(len(pair[0]), generator=torch.Generator().manual_seed(seed))[:count]
    return functional.adaptive_avg_pool2d(pair[0][which], 8).double(), pair[1][which]


def small_net(convolutional: bool, seed: int) -> nn.Module:
    """A net for 8 x 8 images of one channel, float64: dense with 1,210 weights, or convolutional with 1,954."""
    torch.manual_seed(seed)
    layers = [nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)]
    if convolutional:
        front = [nn.Conv2d(1, 8, 3, 1, 1), nn.Tanh(), nn.Conv2d(8, 8, 3, 2, 1), nn.Tanh()]
        layers = [*front, nn.Flatten(), nn.Linear(128, 10)]
    return nn.Sequential(*layers).double()


def cross_entropies(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The cross entropy of every example of a batch ``(inputs, labels)``, as (examples,)."""
    return functional.cross_entropy(module(batch[0]), batch[1], reduction="none")
