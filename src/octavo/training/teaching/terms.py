"""What a term of a lesson is: one comparison of a student with its teacher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from octavo.errors import RequestError

#: Outputs of a module of the teacher, and of one of the student.
TensorPair = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Term(ABC):
    """One comparison of a student with its teacher; its fields are its knobs.

    Parameters
    ----------
    weight
        Factor of this term in the lesson's sum. With None the term is scaled in every step to the value of the
        lesson's first term; the scale has no gradient.
    """

    weight: float | None = 1.0

    @abstractmethod
    def pairs(self, teacher: nn.Module, student: nn.Module) -> list[tuple[str, str]]:
        """Names of the modules whose outputs are compared: of the teacher, and of the student."""

    @abstractmethod
    def value(self, pairs: Sequence[TensorPair], mask: Tensor | None) -> Tensor:
        """The scalar to minimize.

        Parameters
        ----------
        pairs
            Outputs of the modules of :meth:`pairs`, in that order; the student's went through its map, if it has one.
        mask
            (sequences, tokens), zero for padding; None if the batch has no mask.
        """

    def map(self, theirs: Tensor, ours: Tensor) -> nn.Module | None:
        """A map of the student's output to the width of the teacher's, to be trained; None if it needs none."""
        return None


def same_places(pair: TensorPair, channels: int) -> None:
    """Raise :class:`RequestError` unless both outputs have one shape, except in the dimension of ``channels``."""
    theirs, ours = (list(output.shape) for output in pair)
    if len(theirs) != len(ours):
        raise RequestError(f"teaching: outputs of shapes {theirs} and {ours} cannot be compared; choose modules alike")
    wide, thin = theirs.pop(channels), ours.pop(channels)
    if theirs != ours:
        raise RequestError(
            f"teaching: the teacher has {theirs} places and the student {ours}; both must read the same sequences or "
            "images, and be compared at one resolution"
        )
    if wide != thin:
        raise RequestError(
            f"teaching: widths are {wide} in the teacher and {thin} in the student; train inside `with "
            "lesson.maps(student, batch):`, which adds learned maps"
        )
