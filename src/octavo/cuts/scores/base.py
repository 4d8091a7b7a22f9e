"""What a score is: evidence from data where it needs any, and a number for each unit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from octavo.calibration.objective import Objective
from octavo.cuts.base import Units
from octavo.sources.batches import Batch
from octavo.system.registry import Registry

#: What a score saw of the model's data.
S = TypeVar("S")
C = TypeVar("C", bound="type[Score[Any]]")


class Score(ABC, Generic[S]):
    """A way to say what units are worth; its dataclass fields are its knobs.

    Scores of units of one name are comparable: the lowest go first. Those of different names need not be.
    """

    name: ClassVar[str]
    source: ClassVar[str]

    @abstractmethod
    def observe(self, model: nn.Module, units: Sequence[Units], batches: Sequence[Batch], objective: Objective) -> S:
        """The evidence that :meth:`scores` needs; the model stays as it is.

        Parameters
        ----------
        objective
            Says how outputs are compared, and draws the labels of gradients where there are none.
        """

    def scores(self, model: nn.Module, units: Sequence[Units], seen: S) -> dict[str, Tensor]:
        """What every unit is worth, (count,) by the units' name; by default what was observed."""
        return {part.name: seen[part.name] for part in units}  # type: ignore[index]


#: All scores by the name that users write.
SCORES = Registry[type[Score[Any]]]("score", "octavo.cuts.scores")


def score(name: str, *, source: str) -> Callable[[C], C]:
    """Register a score under the name that users write; ``source`` is where it was published."""

    def register(cls: C) -> C:
        SCORES.add(name, cls)
        cls.name, cls.source = name, source
        return cls

    return register


def summed(part: Units, values: Mapping[str, Tensor]) -> Tensor:
    """Sums over all elements that go with each unit, (count,) in float64.

    Parameters
    ----------
    values
        A tensor of the same shape for every tensor that a unit hangs on; those that are missing count as zero.
    """
    total = torch.zeros(part.count, dtype=torch.float64)
    for piece in part.slices:
        if piece.tensor in values:
            whole = values[piece.tensor].double().movedim(piece.dim, 0)
            whole = whole.reshape(len(whole), -1).sum(1).cpu()
            total += whole[piece.places].flatten(1).sum(1)
    for number, names in enumerate(part.wholes):
        total[number] += sum(float(values[name].double().sum()) for name in names if name in values)
    return total
