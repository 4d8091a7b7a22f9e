"""Number formats of weights that train: integers and small floats, scaled by rows and rounded straight through."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from octavo.errors import RequestError
from octavo.forms import BlockScaled, Codebook, Dense, Form, Grid
from octavo.methods.quantize.grids import compact
from octavo.methods.quantize.small_floats import VALUES, values_of
from octavo.training.computed import Rounded, refuse_shared, usual_layouts

#: Bits of a row's scale.
SCALE_BITS = 16
_INTEGERS = re.compile(r"int([2-8])")


@dataclass(frozen=True)
class NumberFormat:
    """Integers of some bits, ``int2`` to ``int8``, or floats, such as ``e2m1`` and ``e4m3``, scaled by rows.

    The scale of a row maps its largest magnitude to the largest value of the format, so nothing is clipped.

    Examples
    --------
    >>> NumberFormat("int4").bits, NumberFormat("e2m1").bits
    (4, 4)
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in VALUES and not _INTEGERS.fullmatch(str(self.name)):
            raise RequestError(
                f"number format: {self.name!r} is not known; choose int2 to int8, or {', '.join(VALUES)}"
            )

    @property
    def bits(self) -> int:
        """Bits of a value."""
        if self.name in VALUES:
            exponent, mantissa, _ = VALUES[self.name]
            return 1 + exponent + mantissa
        return int(self.name.removeprefix("int"))

    def cost(self, shape: tuple[int, int]) -> int:
        """Bits of a matrix (rows, columns) with its scales, before entropy coding."""
        return shape[0] * (shape[1] * self.bits + SCALE_BITS)

    def form(self, matrix: Tensor) -> Form:
        """A float matrix (rows, columns) rounded to nearest."""
        largest = matrix.abs().amax(1, keepdim=True)
        if self.name not in VALUES:
            most = 2 ** (self.bits - 1) - 1
            scale = compact(largest / most)
            return Grid(_over(matrix, scale).round_().clamp_(-most, most).to(torch.int8), scale)
        values = values_of(self.name).to(matrix.device)
        scale = compact(largest / values[-1])
        edges = (values[1:] + values[:-1]) / 2
        codes = torch.bucketize(_over(matrix, scale), edges, out_int32=True).to(torch.uint8)
        return BlockScaled(Codebook(codes, values.half()), Dense(scale))


def _over(matrix: Tensor, scale: Tensor) -> Tensor:
    """A matrix over the scales of its rows; rows of zeros stay zeros."""
    return matrix / scale.float().clamp_min(torch.finfo(torch.float32).tiny)


def rounding(
    model: nn.Module, names: Sequence[str], settled: Mapping[str, NumberFormat]
) -> dict[str, tuple[Rounded, tuple[int, int]]]:
    """Round weights of a model whenever they are read; returns their parametrizations and the shapes of their matrices.

    Raises
    ------
    RequestError
        If a weight is shared with another module, which would still read it unrounded.
    """
    found = {}
    refuse_shared(model, names)
    for name, layout in usual_layouts(model, names).items():
        owner, _, parameter = name.rpartition(".")
        module, part = model.get_submodule(owner), Rounded(settled[name], layout)
        shape = layout.matrix_shape(tuple(getattr(module, parameter).shape))
        parametrize.register_parametrization(module, parameter, part)
        part.train(module.training)
        found[name] = part, shape
    return found
