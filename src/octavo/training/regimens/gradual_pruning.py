"""Gradual magnitude pruning: weights are masked in many small steps while the others learn to do without them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from octavo.errors import RequestError
from octavo.forms import Form
from octavo.training.masks import Pattern, WeightMasks, cubic
from octavo.training.regimens.base import Regimen, regimen

SOURCE = "To prune, or not to prune (Zhu & Gupta, 2017, arXiv 1710.01878)"


@regimen("gradual-pruning", source=SOURCE)
@dataclass
class GradualPruning(Regimen):
    """Mask the smallest weights in ``events`` steps, to a sparsity that rises as a cubic and is reached exactly.

    At event ``k`` of ``n`` the share ``s_k = s_n + (s_0 - s_n) (1 - k / n)^3`` of every weight is masked, smallest
    magnitudes first. Masked weights, their gradients and what the optimizer remembers of them are zero from then on.
    After the last event the masks stay, and the others train on. The learning rate should still be large while masks
    change.

    Parameters
    ----------
    sparsity, initial
        Share of masked weights at the last event and at the first.
    start, end
        When the first event is and the last, as shares of the steps. The paper lets a net learn before the first.
    events
        How many events follow the first, at even distances. With ``start`` equal to ``end`` all is masked at once.
    across
        Whether all weights are ranked together instead of each for itself.
    pattern
        ``(n, m)``: at the end n of every m neighbours in a row stay. It takes the place of ``sparsity``.
    names
        Globs of the weights; by default those of all linear layers, convolutions and embeddings.
    """

    sparsity: float = 0.8
    initial: float = 0.0
    start: float = 0.1
    end: float = 0.7
    events: int = 20
    across: bool = False
    pattern: Pattern | None = None
    names: tuple[str, ...] | None = None
    _masks: WeightMasks | None = field(default=None, init=False, repr=False)
    _at: dict[int, float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.pattern is not None:
            keep, group = self.pattern
            if not 0 < keep < group <= 8:
                raise RequestError(f"gradual pruning: pattern is {keep}:{group}; choose 1 ≤ n < m ≤ 8")
            self.sparsity = 1 - keep / group
        if not 0 <= self.initial <= self.sparsity < 1:
            raise RequestError(
                f"gradual pruning: initial is {self.initial!r} and sparsity {self.sparsity!r}; they must be at least "
                "0, below 1 and rising"
            )
        if not 0 <= self.start <= self.end <= 1 or self.events < 1:
            raise RequestError(
                f"gradual pruning: start is {self.start!r}, end {self.end!r} and events {self.events!r}; give shares "
                "of the steps, the first no later than the last, and at least one event"
            )

    def begin(self, model: nn.Module, steps: int) -> None:
        """Find the weights, and say which steps have an event."""
        self._masks = WeightMasks(model, self.names)
        first = min(round(self.start * steps), steps - 1)
        span, count = min(round(self.end * steps), steps - 1) - first, self.events
        # Where there are fewer steps than events, a step has the last of its own.
        self._at = {
            first + span * event // count: cubic(event / count, self.initial, self.sparsity)
            for event in range(count + 1)
        }

    def optimized_by(self, optimizer: torch.optim.Optimizer) -> None:
        """What it remembers of masked weights is zero, too."""
        self._held.optimizer = optimizer

    def before_step(self, step: int) -> None:
        """Mask more weights where it is time."""
        if step in self._at:
            self._held.prune(self._at[step], across=self.across, pattern=self.pattern)

    def after_backward(self, step: int) -> None:
        """Masked weights have no gradients."""
        self._held.hold_gradients()

    def after_step(self, step: int) -> None:
        """Masked weights stay zero, whatever the optimizer did."""
        self._held.hold()

    def state(self) -> dict[str, Any]:
        """The masks."""
        return dict(self._held.kept)

    def resume(self, state: dict[str, Any]) -> None:
        """Continue with these masks."""
        self._held.kept = dict(state)

    def forms(self, model: nn.Module) -> dict[str, Form]:
        """Masks and the weights that are left."""
        return self._held.forms(model, self.pattern)

    @property
    def _held(self) -> WeightMasks:
        if self._masks is None:
            raise RequestError(
                "gradual pruning: nothing was trained yet; give the regimen to octavo.training.fit first"
            )
        return self._masks
