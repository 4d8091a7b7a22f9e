"""Checkpoint tensors that get another shape in a module: fused, split, stacked or reordered.

A loader may stack the matrices of all experts to one parameter, or split one matrix of queries, keys and values into
three. Its functions are reused for other tensors. So changed tensors reach the module exactly as after loading, and
gradients of a parameter reach the checkpoint's tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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
        result = torch.zeros(sum(sizes))
        for target, place in places.items():
            if target in gradients:
                result.index_add_(0, place.flatten(), gradients[target].flatten().float())
        return [part.reshape(shape) for part, shape in zip(result.split(sizes), shapes, strict=True)]
