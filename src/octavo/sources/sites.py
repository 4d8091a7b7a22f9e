"""Sites: the weights for which decisions are made, and how each is read as a matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.coding.ggml import StoredBlocks


@dataclass(frozen=True)
class Layout:
    """How a weight is read as a matrix of output rows and input columns.

    Parameters
    ----------
    kind
        ``rows_first`` (linear, embedding, convolution: dimension 0 is the output), ``columns_first`` (GPT-2 ``Conv1D``:
        dimension 1 is the output), ``transposed`` (transposed convolution: (in, out / groups, *kernel)) or ``stacked``
        (matrices in one tensor, such as those of experts: all dimensions except the last form the rows).
    groups
        Groups of a transposed convolution.
    exponent
        The matrix is the weight divided by this power of two. It is zero except for weights so small or large that
        their squares would not be finite, normal floats.
    """

    kind: str = "rows_first"
    groups: int = 1
    exponent: int = 0

    @property
    def scale(self) -> float:
        """The factor from the matrix to the weight."""
        return 2.0**self.exponent

    def matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of the matrix of a weight of ``shape``."""
        total = math.prod(shape)
        if self.kind == "stacked":
            return (total // shape[-1] if shape[-1] else 0, shape[-1])
        rows = shape[0] if self.kind == "rows_first" else shape[1] * (self.groups if self.kind == "transposed" else 1)
        return (rows, total // rows if rows else 0)

    def to_matrix(self, weight: Tensor) -> Tensor:
        """The weight as (rows, columns), contiguous."""
        rows, columns = self.matrix_shape(tuple(weight.shape))
        if self.exponent:
            weight = weight.double() / self.scale
        if self.kind == "columns_first":
            return weight.t().contiguous()
        if self.kind == "transposed":
            split = weight.reshape(self.groups, weight.shape[0] // self.groups, weight.shape[1], -1)
            return split.permute(0, 2, 1, 3).reshape(rows, columns).contiguous()
        return weight.reshape(rows, columns).contiguous()

    def to_gradient(self, gradient: Tensor) -> Tensor:
        """Gradients at a layer's output, converted as if its weight were the matrix."""
        return gradient.double() * self.scale if self.exponent else gradient

    def from_matrix(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Exact inverse of :meth:`to_matrix`."""
        if self.exponent:
            matrix = matrix.double() * self.scale
        if self.kind == "columns_first":
            return matrix.t().contiguous()
        if self.kind == "transposed":
            split = matrix.reshape(self.groups, shape[1], shape[0] // self.groups, -1)
            return split.permute(0, 2, 1, 3).reshape(shape).contiguous()
        return matrix.reshape(shape)


@dataclass(frozen=True)
class Site:
    """A weight that gets one method and one setting.

    Parameters
    ----------
    name
        Name of the tensor in the source.
    kind
        ``linear``, ``convolution``, ``embedding`` or ``head``; ``vector`` for the values of a mask, which are one row.
    shape
        Shape of the tensor; :attr:`rows` and :attr:`columns` are those of its matrix.
    dtype
        Floating dtype in the source.
    blocks
        Its blocks in the source's file, if a target can take them over.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: Layout = Layout()
    tied: tuple[str, ...] = ()
    blocks: StoredBlocks | None = None

    @property
    def rows(self) -> int:
        """Rows of the matrix (outputs, or tokens of an embedding)."""
        return self.layout.matrix_shape(self.shape)[0]

    @property
    def columns(self) -> int:
        """Columns of the matrix (inputs, or channels of an embedding)."""
        return self.layout.matrix_shape(self.shape)[1]

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)
