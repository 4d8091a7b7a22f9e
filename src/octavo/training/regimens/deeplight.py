"""DeepLight's pruning: a share of zeros that rises at once and slowly towards its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from octavo.errors import RequestError
from octavo.forms import Form
from octavo.training.masks import WeightMasks
from octavo.training.regimens.base import Regimen, regimen


@regimen("deeplight", source="DeepLight (Deng et al., 2021, arXiv 2002.06987)")
@dataclass
class DeepLight(Regimen):
    """Every few steps, the smallest magnitudes become zero until their share is ``sparsity * (1 - 0.99^(t / 100))``.

    Here ``t`` runs to the same value ``length`` however many steps there are, and the last pruning reaches the sparsity
    exactly. Unlike with ``gradual-pruning``, most zeros come early.

    Parameters
    ----------
    sparsity
        Share of the weights that are zero at the end.
    every
        Steps from one pruning to the next.
    length
        What the steps of a run count as: after 30,000, 95% of the zeros are there.
    end
        Share of the steps after which masks stay.
    names
        Globs of the weights; by default those of all linear layers, convolutions and embeddings.
    """

    sparsity: float = 0.9
    every: int = 10
    length: int = 30000
    end: float = 0.75
    names: tuple[str, ...] | None = None
    _masks: WeightMasks | None = field(default=None, init=False, repr=False)
    _last: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1 or self.every < 1 or self.length < 1 or not 0 < self.end <= 1:
            raise RequestError(
                f"deeplight: sparsity is {self.sparsity!r}, every {self.every!r}, length {self.length!r} and end "
                f"{self.end!r}; give a sparsity from 0 to below 1, whole numbers from 1, and a share of the steps"
            )

    def begin(self, model: nn.Module, steps: int) -> None:
        """Find the weights, and the step of the last pruning."""
        self._masks, self._last = WeightMasks(model, self.names), max(0, round(self.end * steps) - 1)

    def optimized_by(self, optimizer: torch.optim.Optimizer) -> None:
        """What it remembers of masked weights is zero, too."""
        self._held().optimizer = optimizer

    def after_backward(self, step: int) -> None:
        """Gradients of zeros do not count."""
        self._held().hold_gradients()

    def after_step(self, step: int) -> None:
        """Prune where it is time, and hold zeros."""
        masks = self._held()
        if step == self._last:
            masks.prune(self.sparsity)
        elif step < self._last and step % self.every == 0:
            masks.prune(self.sparsity * (1 - 0.99 ** (self.length * step / max(1, self._last) / 100)))
        else:
            masks.hold()

    def state(self) -> dict[str, Any]:
        """The masks."""
        return {"kept": dict(self._held().kept)}

    def resume(self, state: dict[str, Any]) -> None:
        """Continue with these masks."""
        self._held().kept = dict(state["kept"])

    def forms(self, model: nn.Module) -> dict[str, Form]:
        """Masks and the weights that are left."""
        return self._held().forms(model)

    def _held(self) -> WeightMasks:
        if self._masks is None:
            raise RequestError("deeplight: has not begun; give it to octavo.training.fit")
        return self._masks
