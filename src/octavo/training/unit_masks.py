"""Random masks of units while a model trains."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from octavo.cuts.base import Units
from octavo.cuts.readers import UnitReader, readers_of
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
        self._norms, self._readers = _norms_of(model, units), readers_of(model, units)
        if not self._norms and not self._readers:
            raise RequestError(
                f"masks: no layer reads {units.name!r} and no norm has it, so it cannot be masked; leave it out"
            )
        device = next(model.parameters()).device
        self.mean = torch.ones(units.count, device=device, requires_grad=True)
        self.log_variance = torch.full((units.count,), _START, device=device, requires_grad=True)
        #: Which units are kept, once the masks are fixed.
        self.kept: Tensor | None = None
        self._drawn: Tensor | None = None
        self._hooks: list[RemovableHandle] = []
        for norm in self._norms:
            self._hooks.append(norm.module.register_forward_hook(partial(self._normalized, norm)))
        for reader in self._readers:
            self._hooks.append(reader.module.register_forward_pre_hook(partial(self._read, reader)))

    def ratio(self) -> Tensor:
        """:func:`octavo.training.bottleneck.noise_ratio` of every unit."""
        return noise_ratio(self.mean, self.log_variance)

    def divergence(self) -> Tensor:
        """:func:`octavo.training.bottleneck.divergence` of every unit."""
        return divergence(self.mean, self.log_variance)

    def soft(self) -> Tensor:
        """:func:`octavo.training.bottleneck.soft_mask` of every unit."""
        return soft_mask(self.ratio())

    def renew(self) -> None:
        """Draw other masks in the next step."""
        self._drawn = None

    @torch.no_grad()
    def fix(self, kept: Tensor) -> None:
        """Multiply the means into the weights, and choose what is kept."""
        for place in self._norms or self._readers:
            _scale(place, self.mean)
        self.kept = kept

    @torch.no_grad()
    def remove(self) -> None:
        """End the hooks, and leave zeros where units are not kept."""
        for hook in self._hooks:
            hook.remove()
        if self.kept is not None:
            for place in (*self._norms, *self._readers):
                _scale(place, self.kept.to(self.mean))

    def state(self) -> dict[str, Any]:
        """Masks, and what is kept."""
        return {"mean": self.mean.detach(), "log_variance": self.log_variance.detach(), "kept": self.kept}

    def resume(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state`."""
        self.mean.data.copy_(state["mean"])
        self.log_variance.data.copy_(state["log_variance"])
        self.kept = state["kept"]

    def _values(self, examples: int, training: bool) -> Tensor:
        """The masks, (examples or 1, units)."""
        if self.kept is not None:
            return self.kept.to(self.mean)[None]
        if not training:
            return (self.mean * (self.ratio() < 0))[None].detach()
        if self._drawn is None or len(self._drawn) != examples:
            noise = torch.randn(examples, len(self.mean), device=self.mean.device)
            self._drawn = self.mean + (self.log_variance / 2).exp() * noise
        return self._drawn

    def _read(self, reader: UnitReader, module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        # Columns of the stream are masked by their norms. What else has such columns must only be cut as they are.
        if self._norms and self.kept is None:
            return given
        return (_masked(given[0], self._values(len(given[0]), module.training), reader), *given[1:])

    def _normalized(self, norm: UnitReader, module: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> Tensor:
        kept = self.kept if self.kept is not None else self.ratio().detach() < 0
        if not bool(kept.all()):
            columns = _spread(kept, norm, given[0].shape[-1])
            result = _norm_by(module, given[0], columns if bool(columns.any()) else ~columns)
        return _masked(result, self._values(len(result), module.training), norm)


def _norms_of(model: nn.Module, units: Units) -> list[UnitReader]:
    """The norms of a residual stream whose columns are these units."""
    found = []
    for piece in units.slices:
        path, _, leaf = piece.tensor.rpartition(".")
        module = model.get_submodule(path) if leaf == "weight" else None
        if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm"):
            assert module is not None
            found.append(UnitReader(piece.tensor, module, -1, piece.places))
    return found


def _spread(values: Tensor, place: UnitReader, features: int) -> Tensor:
    """Values (.., units) to the features of a layer, with ones where they belong to no unit."""
    return functional.pad(values, (0, 1), value=1)[..., place.owners(features).to(values.device)]


def _masked(flow: Tensor, values: Tensor, place: UnitReader) -> Tensor:
    """What a layer reads or writes, times (examples or 1, units)."""
    factors = _spread(values, place, flow.shape[place.axis]).to(flow)
    shape = [len(factors), *[1] * (flow.ndim - 1)]
    shape[place.axis] = factors.shape[1]
    return flow * factors.view(shape)


def _norm_by(module: Any, x: Tensor, columns: Tensor) -> Tensor:
    """What a norm returns if its statistics are those of some columns."""
    part = x[..., columns]
    if isinstance(module, nn.LayerNorm):
        mean = part.mean(-1, keepdim=True)
        x, part, eps = x - mean, part - mean, module.eps
    else:
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", 0.0))
    result = x * (part.square().mean(-1, keepdim=True) + eps).rsqrt() * module.weight
    return result if getattr(module, "bias", None) is None else result + module.bias


def _scale(place: UnitReader, values: Tensor) -> None:
    """Multiply what a norm writes, or what a layer reads."""
    module: Any = place.module
    if module.weight.ndim == 1:
        for tensor in (module.weight, getattr(module, "bias", None)):
            if tensor is not None:
                tensor.mul_(_spread(values, place, len(tensor)).to(tensor))
        return
    # The linear layer of GPT-2 holds (inputs, outputs).
    dim = 0 if type(module).__name__ == "Conv1D" else 1
    shape = [1] * module.weight.ndim
    shape[dim] = module.weight.shape[dim]
    module.weight.mul_(_spread(values, place, shape[dim]).to(module.weight).view(shape))
