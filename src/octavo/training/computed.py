"""Weights that a regimen computes whenever they are read: how they are stored, who else reads them, where they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from octavo.errors import RequestError
from octavo.forms import Form
from octavo.sources.sites import Layout
from octavo.sources.source import from_module


def usual_layouts(model: nn.Module, names: Iterable[str]) -> dict[str, Layout]:
    """How parameters of a model are read as matrices where they are stored, unless something else is said there."""
    source = from_module(model)
    stored = {own: name for name, own in reversed(source.parameters.items())}
    tensors = ((name, stored.get(name, name)) for name in names)
    return {name: source.layout_of(source.aliases.get(tensor, tensor)) for name, tensor in tensors}


def owners(model: nn.Module) -> Counter[int]:
    """How many modules hold each parameter, by its ``id``."""
    return Counter(id(weight) for part in model.modules() for weight in part._parameters.values())


def refuse_shared(model: nn.Module, names: Iterable[str]) -> None:
    """Raise :class:`RequestError` if a parameter belongs to several modules: the others would not see it computed."""
    held = owners(model)
    for name in names:
        if held[id(model.get_parameter(name))] > 1:
            raise RequestError(
                f"{name!r}: is shared with another module, which would read it as it is; leave it out by names, or "
                "give that module a weight of its own first"
            )


class Encoder(Protocol):
    """What finds the form of a matrix, such as a number format or a method at one setting."""

    def form(self, matrix: Tensor) -> Form:
        """The form of a float32 matrix (rows, columns)."""
        ...


class Rounded(nn.Module):
    """A parametrization that rounds a weight, with the gradient of the identity.

    Attributes
    ----------
    settled, drawn
        What finds the form in evaluation mode, and in training mode.
    """

    def __init__(self, settled: Any, layout: Layout) -> None:
        super().__init__()
        self.settled = self.drawn = settled
        self.layout = layout

    def forward(self, weight: Tensor) -> Tensor:
        """The weight as it is stored."""
        chosen = self.drawn if self.training else self.settled
        stored = self.layout.from_matrix(self.form(weight, chosen).dense(), tuple(weight.shape)).to(weight)
        return stored + (weight - weight.detach())

    @torch.no_grad()
    def form(self, weight: Tensor, chosen: Encoder) -> Form:
        """What is stored of a weight."""
        return chosen.form(self.layout.to_matrix(weight.detach().float()))


def chains(model: nn.Module, kind: type[nn.Module], regimen: str) -> dict[str, Any]:
    """The parametrizations of one kind, by the name of their parameter.

    Raises
    ------
    RequestError
        If there is none: the regimen did not train this model.
    """
    found = {
        f"{prefix}.{parameter}".lstrip("."): chain
        for prefix, owner in model.named_modules()
        for parameter, chain in getattr(owner, "parametrizations", {}).items()
        if isinstance(chain[0], kind)
    }
    if not found:
        raise RequestError(
            f"{regimen}: nothing was trained yet in this {type(model).__name__}; give both to octavo.training.fit first"
        )
    return found
