"""Random masks of units while a model trains."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from octavo.cuts.base import Units
from octavo.errors import RequestError
from octavo.training.bottleneck import divergence, noise_ratio, soft_mask

#: Logarithm of the first variances.
_START = -9.0


class UnitMask:
    """Masks ``N(mu, sigma^2)`` of the units at one place, and the hooks by which they act.

    Columns of a residual stream are masked where they are normalized. Statistics of the norm are then those of the
    columns that are kept. All other units are masked where they are read.

    Parameters
    ----------
    model
        The model, which gets the hooks.
    units
        The units.

    Raises
    ------
    RequestError
        If no linear layer or convolution reads the units, and no norm has them as columns.
    """

    def __init__(self, model: nn.Module, units: Units) -> None:
        norms, readers = _places(model, units)
        if not norms and not readers:
            raise RequestError(
                f"masks: no layer reads {units.name!r} and no norm has it, so it cannot be masked; leave it out"
            )
        device = (norms + readers)[0][0].weight.device
        self.mean = torch.ones(units.count, device=device, requires_grad=True)
        self.log_variance = torch.full((units.count,), _START, device=device, requires_grad=True)
        self.kept = torch.ones(units.count, dtype=torch.bool, device=device)
        self.fixed = False
        self.drawn: Tensor | None = None
        self._norms, self._readers = norms, readers
        self._hooks: list[RemovableHandle] = []
        for module, owner in norms:
            self._hooks.append(module.register_forward_hook(partial(self._normalized, owner)))
        for module, owner in readers:
            # Columns of the stream are masked by their norms already; what else has them is only cut.
            self._hooks.append(module.register_forward_pre_hook(partial(self._read, owner, bool(norms))))

    def ratio(self) -> Tensor:
        """:func:`noise_ratio` of every unit."""
        return noise_ratio(self.mean, self.log_variance)

    def divergence(self) -> Tensor:
        """The bound of every unit."""
        return divergence(self.mean, self.log_variance)

    def soft(self) -> Tensor:
        """How far every unit is kept."""
        return soft_mask(self.ratio())

    def fold(self, kept: Tensor) -> None:
        """Multiply the means into the weights, with zeros for what is not kept."""
        self.kept, self.fixed = kept, True
        factors = self.mean.detach() * kept
        for module, owner in self._norms or self._readers:
            _scale(module, _spread(factors, owner), bool(self._norms))
        if self._norms:
            for module, owner in self._readers:
                _scale(module, _spread(kept.float(), owner), False)

    def remove(self) -> None:
        """End all masks."""
        for hook in self._hooks:
            hook.remove()

    def state(self) -> dict[str, Any]:
        """Masks, and what is kept."""
        return {
            "mean": self.mean.detach(), "log_variance": self.log_variance.detach(), "kept": self.kept,
            "fixed": self.fixed,
        }  # fmt: skip

    def resume(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state`."""
        self.mean.data.copy_(state["mean"])
        self.log_variance.data.copy_(state["log_variance"])
        self.kept, self.fixed = state["kept"], state["fixed"]

    def _values(self, examples: int, training: bool) -> Tensor:
        """The masks of every example, (examples or 1, units)."""
        if self.fixed:
            return self.kept.float()[None]
        if not training:
            return (self.mean * (self.ratio() < 0))[None].detach()
        if self.drawn is None or len(self.drawn) != examples:
            noise = torch.randn(examples, len(self.mean), device=self.mean.device)
            self.drawn = self.mean + (self.log_variance / 2).exp() * noise
        return self.drawn

    def _read(self, owner: Tensor, only_cut: bool, module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        if only_cut and not self.fixed:
            return given
        values = _spread(self._values(len(given[0]), module.training), owner)
        channels = 1 if isinstance(module, _CONVOLUTIONS) else given[0].ndim - 1
        return (given[0] * _over(values, given[0], channels), *given[1:])

    def _normalized(self, owner: Tensor, module: Any, given: tuple[Tensor, ...], result: Tensor) -> Tensor:
        kept = self.kept if self.fixed else self.ratio().detach() < 0
        if not bool(kept.all()):
            columns = _spread(kept.float(), owner) > 0
            result = _norm_of(module, given[0], columns if bool(columns.any()) else ~columns)
        return result * _over(_spread(self._values(len(result), module.training), owner), result, result.ndim - 1)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: A module, and for each of its columns the number of the unit, which is their count for a column of none.
_Place = tuple[Any, Tensor]


def _places(model: nn.Module, units: Units) -> tuple[list[_Place], list[_Place]]:
    """Norms that units are columns of, and layers that read them."""
    norms: list[_Place] = []
    readers: list[_Place] = []
    modules = dict(model.named_modules())
    for piece in units.slices:
        path, _, leaf = piece.tensor.rpartition(".")
        module: Any = modules.get(path)
        if leaf != "weight":
            continue
        turned = type(module).__name__ == "Conv1D"
        if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm"):
            found = norms
        elif piece.dim == (0 if turned else 1) and (turned or isinstance(module, (nn.Linear, *_CONVOLUTIONS))):
            found = readers
        else:
            continue
        owner = torch.full((module.weight.shape[piece.dim],), units.count, device=module.weight.device)
        each = torch.arange(units.count, device=owner.device)[:, None].expand(piece.places.shape)
        owner[piece.places.flatten().to(owner.device)] = each.flatten()
        found.append((module, owner))
    return norms, readers


def _spread(values: Tensor, owner: Tensor) -> Tensor:
    """Values (.., units) to the columns of a module, with ones for those of no unit."""
    return functional.pad(values, (0, 1), value=1.0)[..., owner]


def _over(values: Tensor, like: Tensor, channels: int) -> Tensor:
    """Values (examples, columns) in the shape of a tensor with that dimension of channels."""
    shape = [1] * like.ndim
    shape[0], shape[channels] = values.shape
    return values.view(shape)


def _norm_of(module: Any, x: Tensor, columns: Tensor) -> Tensor:
    """What a norm returns if only some columns count for its statistics."""
    part = x[..., columns]
    if isinstance(module, nn.LayerNorm):
        x, part = x - part.mean(-1, keepdim=True), part - part.mean(-1, keepdim=True)
        eps = module.eps
    else:
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", 0.0))
    result = x * (part.square().mean(-1, keepdim=True) + eps).rsqrt() * module.weight
    return result if getattr(module, "bias", None) is None else result + module.bias


def _scale(module: Any, factors: Tensor, norm: bool) -> None:
    """Multiply the inputs that a layer reads, or the outputs of a norm."""
    if norm:
        for leaf in ("weight", "bias"):
            if getattr(module, leaf, None) is not None:
                getattr(module, leaf).mul_(factors)
    elif type(module).__name__ == "Conv1D":
        module.weight.mul_(factors[:, None])
    else:
        module.weight.mul_(factors.view(1, -1, *[1] * (module.weight.ndim - 2)))
