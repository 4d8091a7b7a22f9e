"""VTrans: Gaussian masks of units that find what a stated number of weights is best spent on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from octavo.cuts.base import Units
from octavo.cuts.chains import chain_units
from octavo.cuts.transformer_units import COLUMN, HEAD, NEURON, anatomy, transformer_units
from octavo.errors import RequestError
from octavo.training.bottleneck import UnitSizes
from octavo.training.regimens.base import Regimen, regimen
from octavo.training.unit_masks import UnitMask

SOURCE = "VTrans (Dutta, Gupta & Agarwal, 2024, arXiv 2406.05276)"

#: Bisections of the threshold that meets the size.
_HALVINGS = 50


@regimen("vtrans", source=SOURCE)
@dataclass
class VTrans(Regimen):
    """Every unit is multiplied by a mask ``N(mu, sigma^2)``; where noise outweighs the mean, the unit is not needed.

    A step minimises ``loss + pressure * exp(c) * sum_u share_u KL_u + a (s - t) + b (s - t)^2``. ``KL_u`` is the bound
    of :mod:`octavo.training.bottleneck`, weighted by the unit's share of all weights. ``s`` is the expected share of
    weights that is left, embeddings included, and ``t`` falls from 1 to ``share``. The multipliers ``a``, ``b`` and
    ``c`` ascend, so that the size is met whatever the pressure is at first.

    Masks of the residual stream act where it is normalized, and other masks where units are read. Each example draws
    its own. Statistics of norms are those of the columns that are kept, so a cut model computes the same as a masked
    one. Before the last steps the masks are fixed: their means are multiplied into the weights, and what is left is
    tuned. ``kept`` then says what to cut. It never leaves more than ``share``, even if the multipliers were not done.

    Two things differ from the source. Whole layers are not masked. And ``c`` is new: where noise is still small, ``s``
    has no slope, and only the bound can raise it. A fixed pressure would need far more steps.

    Parameters
    ----------
    units
        What may go, without overlaps.
    share
        Share of all weights of the model that is left, above 0 and below 1.
    pressure
        Weight of the bound at first.
    only_masks
        Whether weights stay as they are until the masks are fixed (Faster-VTrans).
    warmup, tuned
        Shares of the steps: the first, in which ``t`` falls, and the last, in which masks are fixed.
    rate
        Learning rate of masks and multipliers. The noise of a mask needs about ``9 / rate`` steps to reach its mean.
    """

    units: Sequence[Units]
    share: float
    pressure: float = 0.01
    only_masks: bool = False
    warmup: float = 0.25
    tuned: float = 0.25
    rate: float = 0.05
    _masks: dict[str, UnitMask] = field(default_factory=dict, init=False, repr=False)
    _trained: list[nn.Parameter] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise RequestError(f"vtrans: share is {self.share!r}; it must be above 0 and below 1")
        if min(self.warmup, self.tuned) < 0 or self.warmup + self.tuned >= 1:
            raise RequestError(
                f"vtrans: warmup is {self.warmup!r} and tuned {self.tuned!r}; they are shares of the steps, and "
                "together must be below 1"
            )

    @classmethod
    def suited_to(cls, model: nn.Module) -> Self:
        """Half of the weights: heads, neurons and columns of a described transformer, or the units of a chain."""
        found = anatomy(model)
        units = chain_units(model) if found is None else transformer_units(found, (HEAD, NEURON, COLUMN))
        return cls(units, 0.5)

    def begin(self, model: nn.Module, steps: int) -> None:
        """Give every unit its mask."""
        self._sizes = UnitSizes(model, self.units)
        least = float(self._sizes.left({part.name: torch.ones(1) for part in self.units})) / self._sizes.total
        if least > self.share:
            raise RequestError(
                f"vtrans: share is {self.share!r}, but with one unit at every place {least:.3f} of the weights are "
                "left; give more, or other units"
            )
        for part in self.units:
            self._masks[part.name] = UnitMask(model, part)
        ones = {name: torch.ones_like(mask.mean) for name, mask in self._masks.items()}
        self._weights = {
            part.name: (1 - float(self._sizes.left(ones | {part.name: ones[part.name][1:]})) / self._sizes.total)
            for part in self.units
        }
        device = next(model.parameters()).device
        self._multipliers = torch.zeros(3, device=device, requires_grad=True)
        masks = [leaf for mask in self._masks.values() for leaf in (mask.mean, mask.log_variance)]
        self._adam = torch.optim.Adam(masks, self.rate)
        self._ascent = torch.optim.Adam([self._multipliers], self.rate, maximize=True)
        self._last_noise = max(0, round((1 - self.tuned) * steps) - 1)
        self._rise, self._fixed, self._now = max(1, round(self.warmup * steps)), False, 1.0
        #: Share of weights that the masks themselves left, before ``kept`` met the stated one.
        self.found = 1.0
        self._trained = [weight for weight in model.parameters() if weight.requires_grad]

    def before_step(self, step: int) -> None:
        """Draw new masks; let the stated share fall."""
        self._now = 1 - (1 - self.share) * min(1.0, (step + 1) / self._rise)
        for mask in self._masks.values():
            mask.renew()
        if self.only_masks and not self._fixed:
            for weight in self._trained:
                weight.requires_grad_(False)

    def penalty_of(self, model: nn.Module) -> Tensor | None:
        """The bound and the size of all masks; none when they are fixed."""
        if self._fixed:
            return None
        bound = torch.stack([self._weights[name] * mask.divergence().sum() for name, mask in self._masks.items()])
        over = self._sizes.left({name: mask.soft() for name, mask in self._masks.items()}) / self._sizes.total
        over = over - self._now
        linear, square, urge = self._multipliers
        size = linear * over + square * over.square() + urge * over.detach()
        return self.pressure * urge.detach().exp() * bound.sum() + size

    def after_backward(self, step: int) -> None:
        """Train the masks, and let the multipliers ascend."""
        if self.only_masks:
            # Weights are frozen only while gradients are computed, so that none stays so after the last step.
            for weight in self._trained:
                weight.requires_grad_(True)
        if not self._fixed:
            self._adam.step()
            self._ascent.step()
        self._adam.zero_grad()
        self._ascent.zero_grad()

    def after_step(self, step: int) -> None:
        """Fix the masks in time."""
        if step == self._last_noise:
            self._fix()

    def abort(self, model: nn.Module) -> None:
        """End the masks, and let weights be trained on."""
        for weight in self._trained:
            weight.requires_grad_(True)
        for mask in self._masks.values():
            mask.remove()

    def state(self) -> dict[str, Any]:
        """Masks and multipliers."""
        return {
            "masks": {name: mask.state() for name, mask in self._masks.items()}, "fixed": self._fixed,
            "multipliers": self._multipliers.detach(), "found": self.found, "adam": self._adam.state_dict(),
            "ascent": self._ascent.state_dict(),
        }  # fmt: skip

    def resume(self, state: dict[str, Any]) -> None:
        """Continue with these masks and multipliers."""
        for name, mask in self._masks.items():
            mask.resume(state["masks"][name])
        self._multipliers.data.copy_(state["multipliers"])
        self._fixed, self.found = state["fixed"], state["found"]
        self._adam.load_state_dict(state["adam"])
        self._ascent.load_state_dict(state["ascent"])

    def kept(self, model: nn.Module) -> dict[str, Tensor]:
        """The units to keep; the model without the others computes the same."""
        if not self._fixed:
            self._fix()
        for mask in self._masks.values():
            mask.remove()
        return {name: mask.kept.clone() for name, mask in self._masks.items() if mask.kept is not None}

    @torch.no_grad()
    def _fix(self) -> None:
        """Choose what is kept, within the share, and fold the masks into the weights."""
        ratios = {name: mask.ratio() for name, mask in self._masks.items()}
        self.found = self._size(_below(ratios, 0.0))
        low, high = min(float(values.min()) for values in ratios.values()), 0.0
        if self.found > self.share:
            for _ in range(_HALVINGS):
                middle = (low + high) / 2
                low, high = (middle, high) if self._size(_below(ratios, middle)) <= self.share else (low, middle)
            high = low
        for name, kept in _below(ratios, high).items():
            self._masks[name].fix(kept)
        self._fixed = True

    def _size(self, kept: dict[str, Tensor]) -> float:
        return float(self._sizes.left({name: mask.float() for name, mask in kept.items()})) / self._sizes.total


def _below(ratios: dict[str, Tensor], threshold: float) -> dict[str, Tensor]:
    """Units whose ratio is below the threshold, and the one of the lowest ratio of each place."""
    return {name: (values < threshold) | (values == values.min()) for name, values in ratios.items()}
