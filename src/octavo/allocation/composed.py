"""Weights that are computed from the dense leaves of a form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from octavo.artifact import Entry, Packed
from octavo.artifact.joining import Outline
from octavo.forms import Form
from octavo.forms.leaves import dense_leaves, with_dense_leaves
from octavo.sources.conversions import Conversion
from octavo.sources.sites import Layout


@dataclass(frozen=True)
class Composed:
    """A weight of a source that is computed from the dense leaves of a form.

    Parameters
    ----------
    name
        The weight's name in the source.
    target
        Its parameter in the module.
    form
        The form of its matrix.
    layout, shape, dtype
        How the matrix becomes the weight.
    """

    name: str
    target: str
    form: Form
    layout: Layout
    shape: tuple[int, ...]
    dtype: torch.dtype

    @cached_property
    def leaves(self) -> dict[str, Tensor]:
        """The leaves by the weight's name and their place in the form: ``0.weight/left``."""
        places = {id(tensor): part.rpartition("/")[0] for part, tensor in self.form.tensors().items()}
        return {f"{self.name}/{places[id(leaf)]}": leaf for leaf in dense_leaves(self.form)}

    @cached_property
    def outline(self) -> Outline:
        """The packed form, whose leaves can be replaced."""
        return Outline.of(self.form)

    def weight(self, leaves: Iterable[Tensor]) -> Tensor:
        """The weight for other values of the leaves, float32."""
        return self.layout.from_matrix(with_dense_leaves(self.form, leaves).dense(), self.shape)

    @property
    def conversion(self) -> Conversion:
        """How a source's tensors, the leaves, become the weight of its module."""
        return Chained(tuple(self.leaves), (self.target,), self._made, self)

    def _made(self, leaves: Sequence[Tensor]) -> dict[str, Tensor]:
        return {self.target: self.weight(leaves)}

    def packed(self, leaves: Mapping[str, Packed]) -> Packed:
        """The packed form with packed leaves, by name."""
        return self.outline.filled({name[len(self.name) + 1 :]: leaves[name] for name in self.leaves})

    def entry(self, leaves: Mapping[str, Packed]) -> Entry:
        """The weight with packed leaves as it stands in an artifact."""
        return Entry(self.packed(leaves), self.shape, self.dtype, self.layout)


@dataclass(frozen=True)
class Chained(Conversion):
    """The leaves of a form become a weight, whose gradient reaches them by the chain rule."""

    weight: Composed

    def back(self, gradients: Mapping[str, Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Gradients of the leaves from that of the weight."""
        with torch.enable_grad():
            leaves = [leaf.detach().float().requires_grad_(True) for leaf in self.weight.leaves.values()]
            weight = self.weight.weight(leaves)
            return list(torch.autograd.grad(weight, leaves, gradients[self.weight.target].to(weight)))
