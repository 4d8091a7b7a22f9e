"""Checkpoint tensors that get another shape in a module: fused, split, stacked or reordered.

A loader may stack the matrices of all experts to one parameter, or split one matrix of queries, keys and values into
three. Its functions are reused for other tensors. So changed tensors reach the module exactly as after loading, and
gradients of a parameter reach the checkpoint's tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from octavo.errors import RequestError


@dataclass(frozen=True)
class Conversion:
    """A group of checkpoint tensors that become a group of module tensors.

    Parameters
    ----------
    names
        Names of the tensors in the checkpoint, in the order of the arguments of ``function``.
    targets
        Names of the resulting module tensors.
    function
        Maps the tensors to the module's tensors by name. It only rearranges elements.
    """

    names: tuple[str, ...]
    targets: tuple[str, ...]
    function: Callable[[Sequence[Tensor]], dict[str, Tensor]]
    #: Where the tensors lie in those of the module, once it is known.
    _views: list[_View] = field(default_factory=list, init=False, repr=False, compare=False)

    def values(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """The module's tensors, by name, from those of the checkpoint."""
        return self.function(tensors)

    def back(self, gradients: Mapping[str, Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Gradients of the checkpoint's tensors from those of the module's; the adjoint of :meth:`values`.

        Parameters
        ----------
        gradients
            By name of the module's tensor. Missing ones are zero.
        shapes
            Shapes of the checkpoint's tensors.

        Raises
        ------
        RequestError
            If the conversion does more than rearrange elements.
        """
        if self._views:
            return [view.of(gradients) for view in self._views]
        sizes = [math.prod(shape) for shape in shapes]
        # Converting the element numbers shows where every element goes.
        kind = torch.int32 if sum(sizes) < 2**31 else torch.int64
        numbers = torch.arange(sum(sizes), dtype=kind).split(sizes)
        places = self.values([part.reshape(shape) for part, shape in zip(numbers, shapes, strict=True)])
        if any(place.dtype != kind for place in places.values()):
            raise RequestError(
                f"{self.names[0]}: the loader computes with this tensor, so gradients cannot be traced back; compress "
                "without data (--preset data-free)"
            )
        # Experts are slices of one tensor. The numbers of all their elements need not be made for every batch.
        self._views.extend(_views(places, [part.view(shape) for part, shape in zip(numbers, shapes, strict=True)]))
        if self._views:
            return [view.of(gradients) for view in self._views]
        result = torch.zeros(sum(sizes))
        for target, place in places.items():
            if target in gradients:
                result.index_add_(0, place.flatten(), gradients[target].flatten().float())
        return [part.reshape(shape) for part, shape in zip(result.split(sizes), shapes, strict=True)]


@dataclass(frozen=True)
class _View:
    """A tensor of the checkpoint as a strided view of one of the module's tensors."""

    target: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The part of the module's tensor in float32; zeros if the tensor is missing."""
        if self.target not in tensors:
            return torch.zeros(self.shape)
        return tensors[self.target].contiguous().as_strided(self.shape, self.strides, self.offset).float()


def _views(places: Mapping[str, Tensor], numbers: Sequence[Tensor]) -> list[_View]:
    """The views of all tensors; none if one of them is not a strided part of a single tensor.

    Parameters
    ----------
    places
        The module's tensors, filled with the numbers of the elements that they take.
    numbers
        The numbers of the elements of every tensor.
    """
    found: dict[int, _View] = {}
    total = sum(map(Tensor.numel, numbers))
    if sum(map(Tensor.numel, places.values())) != total:
        # An element that is taken twice gets the sum of two gradients.
        return []
    for target, place in places.items():
        flat = place.contiguous().flatten()
        where = torch.full((total,), -1, dtype=flat.dtype)
        where[flat.long()] = torch.arange(len(flat), dtype=flat.dtype)
        for index, part in enumerate(numbers):
            # The first element, and its neighbour in every dimension.
            corners = [part[(0,) * part.ndim]] if part.numel() else []
            corners += [
                part.select(dim, min(1, size - 1)).flatten()[0] for dim, size in enumerate(part.shape) if corners
            ]
            starts = [int(where[int(corner)]) for corner in corners]
            if not starts or min(starts) < 0:
                continue
            strides = tuple(start - starts[0] for start in starts[1:])
            last = starts[0] + sum(stride * (size - 1) for stride, size in zip(strides, part.shape, strict=True))
            if min(strides, default=0) < 0 or last >= len(flat):
                continue
            view = _View(target, tuple(part.shape), strides, starts[0])
            if torch.equal(flat.as_strided(view.shape, view.strides, view.offset), part):
                found[index] = view
    return [found[index] for index in range(len(numbers))] if len(found) == len(numbers) else []
