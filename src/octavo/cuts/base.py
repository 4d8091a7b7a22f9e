"""What a cut is: which units a model has, what each is worth, and the model without those that go."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from octavo.calibration.objective import Objective
from octavo.cuts.choosing import best
from octavo.errors import RequestError
from octavo.sources.batches import Batch
from octavo.system.registry import Registry

#: What a cut saw of the model's data.
E = TypeVar("E")
C = TypeVar("C", bound="type[Cut[Any]]")


@dataclass(frozen=True)
class Slice:
    """Where units lie in one tensor.

    Parameters
    ----------
    tensor
        Name of a parameter or buffer.
    dim
        The dimension of it that becomes shorter.
    places
        (units, places of each) indices along that dimension.
    """

    tensor: str
    dim: int
    places: Tensor


@dataclass(frozen=True)
class Units:
    """Units of one kind at one place in a model, such as the neurons of a layer. One of them is kept at least.

    Parameters
    ----------
    name
        Where they are: ``model.layers.0.mlp``. It is unique in a model.
    kind
        What they are: ``neuron``, ``head``, ``channel``, ``layer``.
    count
        How many there are.
    slices
        All that goes with them: one removal in every tensor that a unit hangs on.
    resizes
        Whether these tensors become smaller. Otherwise zeros take the place of what is removed.
    wholes
        For each unit the tensors that go as a whole, where units are layers. A layer that stays then takes the number
        that it has among those that stay.
    """

    name: str
    kind: str
    count: int
    slices: tuple[Slice, ...]
    resizes: bool = True
    wholes: tuple[tuple[str, ...], ...] = ()


class Cut(ABC, Generic[E]):
    """A way to remove units from a model; its dataclass fields are its knobs.

    A cut *finds* units and scores them, and removes those that are not kept. How many are kept is decided by others
    (:func:`octavo.cuts.best`). ``kept`` is always a mapping of a units' name to (count,) bools.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    #: Whether it must see batches. One that says no is given none where there are none.
    needs_data: ClassVar[bool] = True

    def prepared(self, objective: Objective, batches: Sequence[Batch]) -> Cut[E]:
        """The cut for a request that compares outputs by an objective, and has these batches; by default itself."""
        return self

    @abstractmethod
    def units(self, model: nn.Module) -> list[Units]:
        """All units of a model.

        Raises
        ------
        RequestError
            If the cut does not know the model's architecture.
        """

    @abstractmethod
    def observe(self, model: nn.Module, batches: Iterable[Batch]) -> E:
        """The evidence that :meth:`scores` and :meth:`apply` need, from forward passes; the model stays as it is."""

    @abstractmethod
    def scores(self, model: nn.Module, units: Sequence[Units], evidence: E) -> dict[str, Tensor]:
        """What every unit is worth: (count,) by the units' name. Scores under one name are comparable."""

    def shares(self, units: Sequence[Units], evidence: E, mean: float) -> dict[str, float]:
        """Which share of its units every place gives up so that it is ``mean`` of all; by default all alike."""
        return dict.fromkeys((part.name for part in units), mean)

    def keeping(
        self, model: nn.Module, units: Sequence[Units], scores: Mapping[str, Tensor], shares: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """Which units stay where every place gives up a share; by default those with the highest scores.

        A cut may keep other numbers of units, where those go well together.
        """
        return best({part.name: scores[part.name] for part in units}, shares)

    @abstractmethod
    def apply(self, model: nn.Module, kept: Mapping[str, Tensor], evidence: E) -> nn.Module:
        """A copy of the model without the units that are not kept.

        Tensors become smaller where the modules that read them can run so. Elsewhere what was removed is zero, and a
        :class:`octavo.forms.Trimmed` form stores it without its bytes.
        """


CUTS = Registry[type[Cut[Any]]]("cut", "octavo.cuts")


def cut(name: str, *, source: str) -> Callable[[C], C]:
    """Register a cut under the name that users write; ``source`` is where it was published."""

    def register(cls: C) -> C:
        CUTS.add(name, cls)
        cls.name, cls.source = name, source
        return cls

    return register


def check_kept(units: Sequence[Units], kept: Mapping[str, Tensor]) -> None:
    """Raise :class:`RequestError` unless ``kept`` is of these units, and leaves one of them everywhere."""
    known = {part.name: part for part in units}
    for name in kept:
        if name not in known:
            raise RequestError(f"kept: {name!r} names no units of this model; they are {', '.join([*known][:3])}, ...")
    for name, mask in kept.items():
        if not known[name].slices and not known[name].wholes:
            raise RequestError(
                f"kept: {name!r} names no tensor that loses its {known[name].kind}s, so nothing would go; give its "
                "slices"
            )
        if mask.dtype != torch.bool or tuple(mask.shape) != (known[name].count,):
            raise RequestError(
                f"kept: {name!r} is {mask.dtype} of shape {tuple(mask.shape)}; give bools of shape "
                f"({known[name].count},), one for each {known[name].kind}"
            )
        if not bool(mask.any()):
            raise RequestError(f"kept: no {known[name].kind} of {name!r} is left; keep at least one")


def left(model: nn.Module, units: Sequence[Units], kept: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, ...]]:
    """What stays of every tensor that loses something: for each of its dimensions the bools of what is kept."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
    masks: dict[str, tuple[Tensor, ...]] = {}
    for part in units:
        if part.name not in kept or bool(kept[part.name].all()):
            continue
        for piece in part.slices:
            if piece.tensor not in shapes:
                raise RequestError(
                    f"{type(model).__name__} has no tensor {piece.tensor!r}, on which {part.name!r} hangs"
                )
            ones = masks.setdefault(piece.tensor, tuple(torch.ones(n, dtype=torch.bool) for n in shapes[piece.tensor]))
            ones[piece.dim][piece.places[~kept[part.name].cpu()].flatten()] = False
        for stays, names in zip(kept[part.name].tolist(), part.wholes, strict=bool(part.wholes)):
            if not stays:
                masks |= {name: tuple(torch.zeros(n, dtype=torch.bool) for n in shapes[name]) for name in names}
    return masks


def removed(model: nn.Module, units: Sequence[Units], kept: Mapping[str, Tensor]) -> dict[str, int]:
    """How many elements of every tensor go with the units that are not kept."""
    masks = left(model, units, kept).items()
    return {name: math.prod(map(len, mask)) - math.prod(int(part.sum()) for part in mask) for name, mask in masks}


def saved(model: nn.Module, units: Sequence[Units], kept: Mapping[str, Tensor]) -> int:
    """How many weights go with the units that are not kept."""
    return sum(removed(model, units, kept).values())
