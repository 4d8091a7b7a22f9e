"""Network slimming: the scales of batch normalization are pressed to zero, so that channels can be removed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from octavo.errors import RequestError
from octavo.methods.prune.thresholds import above
from octavo.training.regimens.base import Regimen, regimen

SOURCE = "Network Slimming (Liu et al., 2017, ICCV; arXiv 1708.06519)"


@regimen("slimming", source=SOURCE)
@dataclass
class Slimming(Regimen):
    """Add the sub-gradient ``pressure * sign(gamma)`` to every scale of batch normalization.

    The pressure rises linearly from zero, so that the net first learns what channels are for. Train with
    :func:`without_decay`: weight decay would press scales too, even those that the loss needs. At the end it hands
    over the channels to keep: those whose scale is among the largest of all layers, and a floor of every layer.

    Parameters
    ----------
    pressure
        The final weight of the sum of all ``|gamma|``.
    rise
        Share of the steps in which the pressure rises.
    share
        Of all channels, those to be removed.
    floor
        Share of its channels that every layer keeps at least.
    """

    pressure: float = 1e-3
    rise: float = 0.3
    share: float = 0.5
    floor: float = 0.1
    _scales: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _steps: int = field(default=1, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.pressure < 0 or not 0 <= self.rise <= 1:
            raise RequestError(
                f"slimming: pressure is {self.pressure!r} and rise {self.rise!r}; they must be at least 0, and from 0 "
                "to 1"
            )
        if not 0 <= self.share < 1 or not 0 <= self.floor <= 1:
            raise RequestError(
                f"slimming: share is {self.share!r} and floor {self.floor!r}; they must be from 0 to below 1, and from "
                "0 to 1"
            )

    def begin(self, model: nn.Module, steps: int) -> None:
        """Find the scales."""
        self._scales, self._steps = scales(model), steps

    def after_backward(self, step: int) -> None:
        """Add the sub-gradients."""
        pressure = self.pressure * min(1.0, (step + 1) / max(1.0, self.rise * self._steps))
        for scale in self._scales.values():
            if scale.grad is not None:
                scale.grad.add_(scale.detach().sign(), alpha=pressure)

    def kept(self, model: nn.Module) -> dict[str, Tensor]:
        """Bools of the channels that stay, by the name of their normalization."""
        return above({name: scale.detach().abs() for name, scale in scales(model).items()}, self.share, self.floor)


def scales(model: nn.Module) -> dict[str, Tensor]:
    """The scales of all batch normalizations, by the name of the module.

    Raises
    ------
    RequestError
        If the model has none.
    """
    kind = nn.modules.batchnorm._BatchNorm
    found: dict[str, Tensor] = {
        name: module.weight for name, module in model.named_modules() if isinstance(module, kind) and module.affine
    }
    if not found:
        raise RequestError(
            f"{type(model).__name__}: has no batch normalization with scales, which slimming presses; score its "
            "channels otherwise"
        )
    return found


def without_decay(
    lr: float, decay: float = 5e-4, momentum: float = 0.9
) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """An optimizer for :func:`octavo.training.fit`: Nesterov momentum, with weight decay on all but vectors."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        wide = [parameter for parameter in model.parameters() if parameter.ndim > 1]
        thin = [parameter for parameter in model.parameters() if parameter.ndim < 2]
        groups = [{"params": wide, "weight_decay": decay}, {"params": thin, "weight_decay": 0.0}]
        return torch.optim.SGD([group for group in groups if group["params"]], lr, momentum, nesterov=True)

    return make
