"""Logits with a temperature, as a term of a lesson."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from octavo.errors import RequestError
from octavo.training.losses import divergence
from octavo.training.teaching.terms import TensorPair, Term


@dataclass(frozen=True)
class Logits(Term):
    """``T^2 KL(teacher || student)`` of the output distributions, softened by a temperature ``T``.

    Padding does not count where the models have logits for every token.

    Parameters
    ----------
    temperature
        Minitron distils language models at 1, and classifiers are usual from 2 to 5.
    """

    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise RequestError(f"logits: the temperature is {self.temperature}; it must be positive")

    def pairs(self, teacher: nn.Module, student: nn.Module) -> list[tuple[str, str]]:
        """The outputs of the models."""
        return [("", "")]

    def value(self, pairs: Sequence[TensorPair], mask: Tensor | None) -> Tensor:
        """The divergence, averaged over examples or tokens."""
        ((theirs, ours),) = pairs
        if theirs.shape[-1] != ours.shape[-1]:
            raise RequestError(
                f"logits: the teacher has {theirs.shape[-1]} and the student {ours.shape[-1]}; they must have the same "
                "classes or vocabulary, so give the student the teacher's tokenizer"
            )
        if theirs.shape != ours.shape:
            raise RequestError(
                f"logits: shapes are {tuple(theirs.shape)} in the teacher and {tuple(ours.shape)} in the student; both "
                "must predict the same positions"
            )
        if mask is not None and theirs.shape[:-1] == mask.shape:
            theirs, ours = theirs[mask.bool()], ours[mask.bool()]
        return divergence(theirs / self.temperature, ours / self.temperature) * self.temperature**2
