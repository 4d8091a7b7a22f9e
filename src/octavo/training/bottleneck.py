"""Gaussian masks of units: the information bottleneck's bound, and how many weights the masks are expected to keep."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from octavo.cuts.base import Units
from octavo.errors import RequestError

#: How steeply the soft mask falls where noise begins to outweigh the mean.
_STEEPNESS = 10.0
#: Squares of means are at least this, for their logarithms.
_LEAST = 1e-30


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """``1/2 ln(1 + mu^2 / sigma^2)`` of each unit: KL of ``N(mu, sigma^2)`` to the nearest zero-mean Gaussian."""
    return 0.5 * functional.softplus(-noise_ratio(mean, log_variance))


def noise_ratio(mean: Tensor, log_variance: Tensor) -> Tensor:
    """``ln sigma^2 - ln mu^2`` of each unit; from 0 on its noise outweighs its mean, and it is pruned."""
    return log_variance - mean.square().clamp_min(_LEAST).log()


def soft_mask(ratio: Tensor) -> Tensor:
    """How far a unit with this :func:`noise_ratio` counts as kept, from 1 to 0."""
    return torch.sigmoid(-_STEEPNESS * ratio)


class UnitSizes:
    """How many weights a model has, if its units are kept with given probabilities; tied weights count once.

    Parameters
    ----------
    model
        The model that the units are of.
    units
        Units whose slices do not overlap.

    Raises
    ------
    RequestError
        If units overlap.
    """

    def __init__(self, model: nn.Module, units: Sequence[Units]) -> None:
        shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        pieces: dict[tuple[str, int], list[tuple[str, Tensor]]] = defaultdict(list)
        for part in units:
            for piece in part.slices:
                pieces[piece.tensor, piece.dim].append((part.name, piece.places))
        self.total = sum(map(math.prod, shapes.values()))
        #: For every dimension of every tensor: places that no unit has, and how many each unit of some units has.
        self._tensors: list[list[tuple[int, list[tuple[str, int]]]]] = []
        for tensor, shape in shapes.items():
            dims = []
            for dim, length in enumerate(shape):
                here = pieces.get((tensor, dim), [])
                taken = torch.cat([places.flatten() for _, places in here]) if here else torch.zeros(0)
                if len(taken.unique()) < len(taken):
                    raise RequestError(f"units: some overlap in dimension {dim} of {tensor!r}; give each place once")
                dims.append((length - len(taken), [(name, places.shape[1]) for name, places in here]))
            self._tensors.append(dims)

    def left(self, kept: Mapping[str, Tensor]) -> Tensor:
        """The expected number of weights: of each tensor the product of what is left of its dimensions.

        Parameters
        ----------
        kept
            (count,) probabilities by the name of units.
        """
        sums = {name: values.sum() for name, values in kept.items()}
        total: Any = 0.0
        for dims in self._tensors:
            size: Any = 1.0
            for free, own in dims:
                size = size * (free + sum(each * sums[name] for name, each in own))
            total = total + size
        return torch.as_tensor(total)
