"""Hidden states of matched layers, compared through learned maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from octavo.errors import RequestError
from octavo.training.teaching.terms import TensorPair, Term, same_places


def hidden_error(theirs: Tensor, ours: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean square difference of hidden states (..., width) over all elements, or over those of real tokens.

    Parameters
    ----------
    mask
        (sequences, tokens), zero for padding, if the states are (sequences, tokens, width).
    """
    squares = (theirs - ours).square().mean(-1)
    if mask is None or mask.shape != squares.shape:
        return squares.mean()
    return (squares * mask).sum() / mask.sum()


@dataclass(frozen=True)
class HiddenStates(Term):
    """Mean square difference of the outputs of matched layers, the last dimension being the width.

    If widths differ, a linear map without bias takes the student's states to the teacher's width. It is trained with
    the student and dropped at the end (Romero et al., 2015; TinyBERT, Jiao et al., 2020).

    Parameters
    ----------
    layers
        Names of the teacher's modules, and for each the name of the student's module that follows it. See
        :func:`evenly`.
    """

    layers: Mapping[str, str]

    def __post_init__(self) -> None:
        if not self.layers:
            raise RequestError("hidden states: no layers; give names of the teacher's modules and of the student's")

    def pairs(self, teacher: nn.Module, student: nn.Module) -> list[tuple[str, str]]:
        """The matched layers."""
        return list(self.layers.items())

    def value(self, pairs: Sequence[TensorPair], mask: Tensor | None) -> Tensor:
        """The mean over layers."""
        for pair in pairs:
            same_places(pair, -1)
        return torch.stack([hidden_error(*pair, mask) for pair in pairs]).mean()

    def map(self, theirs: Tensor, ours: Tensor) -> nn.Module | None:
        """A linear map, if widths differ."""
        wide, thin = theirs.shape[-1], ours.shape[-1]
        return None if wide == thin else nn.Linear(thin, wide, bias=False)


def evenly(teacher: Sequence[str], student: Sequence[str]) -> dict[str, str]:
    """Match layers such that the student's are evenly spaced in the teacher, and the last follows the last.

    Examples
    --------
    >>> evenly(["layer.0", "layer.1", "layer.2", "layer.3"], ["block.0", "block.1"])
    {'layer.1': 'block.0', 'layer.3': 'block.1'}

    Raises
    ------
    RequestError
        If the student has no layers, or more than the teacher.
    """
    if not 0 < len(student) <= len(teacher):
        raise RequestError(
            f"layers: {len(student)} of the student cannot be matched to {len(teacher)} of the teacher; give at least "
            "one and at most as many"
        )
    return {teacher[(k + 1) * len(teacher) // len(student) - 1]: name for k, name in enumerate(student)}
