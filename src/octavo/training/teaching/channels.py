"""Channels of feature maps as distributions over pixels: channel-wise distillation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from octavo.errors import RequestError
from octavo.training.teaching.terms import TensorPair, Term, same_places


def channel_divergence(theirs: Tensor, ours: Tensor, temperature: float = 1.0) -> Tensor:
    """``T^2 / C sum_c KL(softmax(y_c / T) || softmax(x_c / T))`` of feature maps (N, C, H, W), averaged over images.

    A channel is a distribution over its pixels, so that its scale does not matter and its brightest places do.
    """
    target, logs = ((part / temperature).flatten(2).log_softmax(-1) for part in (theirs, ours))
    return (target.exp() * (target - logs)).sum(-1).mean() * temperature**2


@dataclass(frozen=True)
class Channels(Term):
    """Channel-wise distillation of feature maps or heat maps (CWD, Shu et al., 2021, arXiv 2011.13256).

    If the numbers of channels differ, a learned 1 x 1 convolution takes the student's to the teacher's; it is trained
    with the student and dropped at the end.

    Parameters
    ----------
    layers
        Names of the teacher's modules, and for each the name of the student's module that follows it.
    temperature
        From 1 to 4 is usual; higher values spread the attention over more pixels.
    """

    layers: Mapping[str, str]
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.layers or not self.temperature > 0:
            raise RequestError(
                f"channels: {len(self.layers)} layers and temperature {self.temperature}; give at least one layer and "
                "a positive temperature"
            )

    def pairs(self, teacher: nn.Module, student: nn.Module) -> list[tuple[str, str]]:
        """The matched layers."""
        return list(self.layers.items())

    def value(self, pairs: Sequence[TensorPair], mask: Tensor | None) -> Tensor:
        """The mean over layers."""
        for pair in pairs:
            if pair[0].ndim != 4:
                raise RequestError(
                    f"channels: an output of shape {tuple(pair[0].shape)} is no map of features; choose modules that "
                    "return (images, channels, height, width)"
                )
            same_places(pair, 1)
        return torch.stack([channel_divergence(*pair, self.temperature) for pair in pairs]).mean()

    def map(self, theirs: Tensor, ours: Tensor) -> nn.Module | None:
        """A 1 x 1 convolution, if the numbers of channels differ."""
        wide, thin = theirs.shape[1], ours.shape[1]
        return None if wide == thin else nn.Conv2d(thin, wide, 1)
