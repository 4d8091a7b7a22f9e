"""Stochastic rounding: up or down by chance, so that the mean is what was rounded."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

#: How finely amounts divide a doubling of the step; a step of so little changes bytes by less than 1%.
FINE = 128


@dataclass(frozen=True)
class Drawn:
    """A vector, and all that rounding needs of it.

    Parameters
    ----------
    flat, draws
        (elements,) float32: values, and numbers of 0 to 1.
    tops
        (blocks,) float64: what the step of each block is a share of.
    """

    flat: Tensor
    draws: Tensor
    tops: Tensor


def draws(flat: Tensor, step: int) -> Tensor:
    """Uniform numbers, (elements,) float32 of 0 to 1: the same for the same values and step of the sender.

    Workers with other values draw other numbers, so that their errors do not add up.
    """
    seed = zlib.crc32(flat.contiguous().numpy().view(np.uint8).data, step & 0xFFFFFFFF)
    return torch.rand(len(flat), generator=torch.Generator().manual_seed(seed))


def rounded(drawn: Drawn, share: float, sizes: Sequence[int], largest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Places, codes that are not zero, and steps (blocks,) float32, where each step is a share of the block's top.

    ``v / step`` becomes the whole number below, or that above with the chance of what lies between.

    Parameters
    ----------
    largest
        Magnitude of the largest ``v / step``, which no code exceeds.
    """
    limits = torch.finfo(torch.float32)
    steps = (drawn.tops * share).clamp(limits.tiny, limits.max).float()
    spread = steps.reciprocal().repeat_interleave(torch.tensor(sizes))
    # The inverse of a step is rounded, too: the largest entry may come out a hair above its code.
    codes = spread.mul_(drawn.flat).add_(drawn.draws).floor_().clamp_(-largest, largest)
    places = codes.nonzero()[:, 0]
    return places, codes[places], steps
