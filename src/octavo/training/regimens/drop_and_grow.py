"""Drop and grow: a net that is sparse from the first step on, and moves its few weights to where they are wanted."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import RequestError
from octavo.forms import Form
from octavo.training.masks import WeightMasks
from octavo.training.regimens.base import Regimen, regimen

SOURCE = "Dynamic Sparse Learning (Wang et al., 2024, WSDM; arXiv 2402.02855)"

GROWTH = ("gradient", "random")


@regimen("drop-and-grow", source=SOURCE)
@dataclass
class DropAndGrow(Regimen):
    """Train at a constant number of weights: now and then drop the smallest, and grow as many elsewhere.

    Training starts from a random mask of the stated density. At each of ``updates`` steps, at even distances, the share
    ``a`` of the kept weights with the smallest magnitudes is dropped. As many masked weights grow, from zero, where the
    loss has the largest gradients. ``a`` falls from ``first`` to ``last`` along a cosine. Dense gradients are read in
    the ``batches`` steps before an update only, and their magnitudes are summed: those of one batch are zero in the
    rows of an embedding that it does not look up.

    With ``growth="random"`` this is sparse evolutionary training (Mocanu et al., 2018, arXiv 1707.04780). Without
    updates it is a random mask that never changes.

    Parameters
    ----------
    density
        Share of the weights that are kept.
    updates
        How often masks change; fewer times if there are fewer than ``batches`` steps for each.
    first, last
        Share of the kept weights that are exchanged, at the start and at the end.
    batches
        Batches whose gradients are summed for an update.
    growth
        ``gradient`` or ``random``.
    across
        Whether all weights are ranked together. Rows and tables then end with different numbers of weights.
    names
        Globs of the weights; by default those of all linear layers, convolutions and embeddings.
    seed
        Seed of the first mask and of random growth.
    """

    density: float = 0.5
    updates: int = 20
    first: float = 0.5
    last: float = 0.005
    batches: int = 4
    growth: str = "gradient"
    across: bool = False
    names: tuple[str, ...] | None = None
    seed: int = 0
    _masks: WeightMasks | None = field(default=None, init=False, repr=False)
    _wanted: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _at: dict[int, float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.density < 1 or not 0 <= self.last <= self.first <= 1:
            raise RequestError(
                f"drop and grow: density is {self.density!r}, first {self.first!r} and last {self.last!r}; give a "
                "density between 0 and 1, and falling shares"
            )
        if self.updates < 0 or self.batches < 1 or self.growth not in GROWTH:
            raise RequestError(
                f"drop and grow: updates is {self.updates!r}, batches {self.batches!r} and growth {self.growth!r}; "
                f"give at least 0 and at least 1, and choose growth from {', '.join(GROWTH)}"
            )

    def begin(self, model: nn.Module, steps: int) -> None:
        """Draw the first mask, and say which steps change it."""
        self._masks = WeightMasks(model, self.names)
        self._masks.scatter(self.density, torch.Generator().manual_seed(self.seed))
        # Sums of different updates never overlap.
        count = min(self.updates, max(0, steps // self.batches - 1))
        at = [steps * (number + 1) // (count + 1) for number in range(count)]
        falls = (self.first - self.last) / 2
        self._at = {step: self.last + falls * (1 + math.cos(math.pi * step / steps)) for step in at}

    def optimized_by(self, optimizer: torch.optim.Optimizer) -> None:
        """What it remembers of masked weights is zero, too."""
        self._held.optimizer = optimizer

    def after_backward(self, step: int) -> None:
        """Sum gradients before an update, change the masks where it is time, and mask the gradients."""
        if self.growth == "gradient" and any(step <= at < step + self.batches for at in self._at):
            for name, weight in self._held.weights.items():
                seen = torch.zeros_like(weight) if weight.grad is None else weight.grad.abs()
                self._wanted[name] = self._wanted[name] + seen if name in self._wanted else seen
        if step in self._at:
            self._held.exchange(self._at[step], self._wanted or self._drawn(step), across=self.across)
            self._wanted = {}
        self._held.hold_gradients()

    def _drawn(self, step: int) -> dict[str, Tensor]:
        """Random numbers for every weight, by the seed and the step, so that an interrupted run draws the same."""
        generator = torch.Generator().manual_seed((self.seed << 32) + step)
        return {
            name: torch.rand(weight.shape, generator=generator).to(weight.device)
            for name, weight in self._held.weights.items()
        }

    def after_step(self, step: int) -> None:
        """Masked weights stay zero, whatever the optimizer did."""
        self._held.hold()

    def state(self) -> dict[str, Any]:
        """The masks, and gradients that were summed so far."""
        return {"kept": dict(self._held.kept), "wanted": dict(self._wanted)}

    def resume(self, state: dict[str, Any]) -> None:
        """Continue with these masks and sums."""
        self._held.kept, self._wanted = dict(state["kept"]), dict(state["wanted"])

    def forms(self, model: nn.Module) -> dict[str, Form]:
        """Masks and the weights that are left."""
        return self._held.forms(model)

    @property
    def _held(self) -> WeightMasks:
        if self._masks is None:
            raise RequestError("drop and grow: nothing was trained yet; give the regimen to octavo.training.fit first")
        return self._masks
