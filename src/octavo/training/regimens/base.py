"""What a regimen is: what acts while a model trains, and what it leaves to be stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from octavo.forms import Form
from octavo.sources.batches import Batch
from octavo.system.registry import Registry
from octavo.training.contents import content
from octavo.training.formed import forms_of
from octavo.training.losses import LossFunction

R = TypeVar("R", bound="type[Regimen]")


@dataclass(frozen=True)
class HandOver:
    """What a regimen leaves after training: forms of weights, units to keep, or both.

    Parameters
    ----------
    forms
        By parameter name: what these weights are to be stored as.
    kept
        Bools by the name of units, for :meth:`octavo.cuts.Cut.apply`; units without a name here all stay.
    """

    forms: Mapping[str, Form]
    kept: Mapping[str, Tensor] = field(default_factory=dict)


class Regimen:
    """A compression method that acts while a model trains; hooks do nothing unless overridden.

    A step calls :meth:`before_step`, the loss by :meth:`loss`, backward, :meth:`after_backward`, the optimizer,
    :meth:`after_step`. A regimen serves one run of :func:`octavo.training.fit`; then :meth:`hand_over` is called.
    """

    name: ClassVar[str] = "none"
    source: ClassVar[str] = ""

    @classmethod
    def suited_to(cls, model: nn.Module) -> Self:
        """The regimen with knobs that fit a model; those that have no default are chosen by its weights."""
        return cls()

    def begin(self, model: nn.Module, steps: int) -> None:
        """Called first, with the number of steps: replace weights by forms, allocate state."""

    def optimized_by(self, optimizer: torch.optim.Optimizer) -> None:
        """Called after :meth:`begin`, for those that change what the optimizer remembers of weights."""

    def before_step(self, step: int) -> None:
        """Called before the forward pass: project or resample weights."""

    def penalty_of(self, model: nn.Module) -> Tensor | None:
        """A scalar that is added to the task's loss, or None."""

    def loss(self, model: nn.Module, batch: Batch, loss: LossFunction) -> Tensor:
        """What is differentiated: the task's loss and the penalty; overridden where they are not just added."""
        value, penalty = loss(model, batch), self.penalty_of(model)
        return value if penalty is None else value + penalty

    def after_backward(self, step: int) -> None:
        """After backward, before the optimizer's step: change gradients."""

    def after_step(self, step: int) -> None:
        """After the optimizer's step: project, or remove what is no longer needed."""

    def after_epoch(self, number: int) -> None:
        """After an epoch."""

    def abort(self, model: nn.Module) -> None:
        """Called if the run ends by an error, in :meth:`begin` perhaps: remove hooks, and restore flags."""

    def knobs(self) -> dict[str, str]:
        """The content of the fields that a dataclass is made with; a checkpoint is of a run with these."""
        names: list[str] = [own.name for own in fields(self) if own.init] if is_dataclass(self) else []
        found = {}
        for name in names:
            value = getattr(self, name)
            try:
                found[name] = content(value)
            except TypeError:
                found[name] = type(value).__name__
        return found

    def state(self) -> dict[str, Any]:
        """State for checkpoints besides the model's parameters and buffers: tensors and plain values."""
        return {}

    def resume(self, state: dict[str, Any]) -> None:
        """Called after :meth:`begin`: continue from the result of :meth:`state`."""

    def forms(self, model: nn.Module) -> dict[str, Form]:
        """The forms to store, by parameter name."""
        return forms_of(model)

    def kept(self, model: nn.Module) -> dict[str, Tensor]:
        """The units that a cut is to keep, by their name; those of a regimen that cuts nothing are none."""
        return {}

    def hand_over(self, model: nn.Module) -> HandOver:
        """All that is left to be stored, after training."""
        return HandOver(self.forms(model), self.kept(model))


REGIMENS = Registry[type[Regimen]]("regimen", "octavo.training.regimens")


def regimen(name: str, *, source: str) -> Callable[[R], R]:
    """Register a regimen under the name that users write; ``source`` is where it was published."""

    def register(cls: R) -> R:
        REGIMENS.add(name, cls)
        cls.name, cls.source = name, source
        return cls

    return register
