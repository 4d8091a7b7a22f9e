"""Coefficients of the cosine transform of convolution kernels or of blocks of a matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from octavo.forms.base import Form, child, elements, expect, form, nest

#: Blocks have no longer side: neighbours that far apart have little in common.
LONGEST_SIDE = 64
#: Rows, height and width of a block.
BlockShape = tuple[int, int, int]


@form("frequency")
@dataclass(frozen=True)
class Frequency(Form):
    """``weight[block] = D_r^T coefficients[block] kron(D_h, D_w)``, with orthonormal cosine transforms ``D``.

    Columns are read as blocks of ``height * width`` elements, row by row. Kernels of a convolution are blocks of
    (1, h, w), tiles of a matrix blocks of (r, 1, w). Coefficients stay at the place of their block, lowest frequency
    first.

    Parameters
    ----------
    coefficients
        Form of the shape of the matrix.
    block
        ``(rows, height, width)``: ``rows`` divides the rows of the matrix, ``height * width`` its columns. No side
        exceeds 64.
    """

    coefficients: Form
    block: BlockShape

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        return self.coefficients.shape

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        return nest(coefficients=self.coefficients)

    def meta(self) -> dict[str, Any]:  # noqa: D102
        return {"form": self.name, "block": list(self.block), "coefficients": self.coefficients.meta()}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> Frequency:  # noqa: D102
        rows, height, width = map(int, meta["block"])
        sides = (rows, height, width)
        expect(elements(shape) > 0, f"blocks of a matrix of shape {shape}, which has no elements")
        expect(min(sides) > 0 and max(sides) <= LONGEST_SIDE, f"a block of {sides}; sides are 1 to {LONGEST_SIDE}")
        expect(
            shape[0] % rows == 0 and shape[1] % (height * width) == 0,
            f"blocks of {sides} do not divide a matrix of shape {shape}",
        )
        return cls(child(tensors, meta, "coefficients", shape), sides)

    @classmethod
    def work(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> int:  # noqa: D102
        # The result of each of three transforms beside what it reads, in two orders; the transforms.
        return 12 * elements(shape) + 36 * LONGEST_SIDE**2

    def dense(self) -> Tensor:  # noqa: D102
        return to_space(self.coefficients.dense(), self.block)

    def lookup(self, index: Tensor) -> Tensor:  # noqa: D102
        # Rows that share blocks need each other.
        if self.block[0] > 1:
            return self.dense()[index]
        return to_space(self.coefficients.lookup(index), self.block)

    def apply(self, x: Tensor) -> Tensor:  # noqa: D102
        rows, height, width = self.block
        found = self.coefficients.apply(to_frequency(x.reshape(-1, x.shape[-1]), (1, height, width)))
        return to_space(found, (1, 1, rows)).reshape(*x.shape[:-1], -1)


@lru_cache(maxsize=256)
def cosines(size: int) -> Tensor:
    """The orthonormal cosine transform (DCT-II) as a float32 matrix: (frequencies, places).

    ``D[u, i] = sqrt((1 or 2) / n) cos(pi (2 i + 1) u / (2 n))``, with 1 for ``u = 0``, else 2.
    """
    values = [
        [math.sqrt((2 if u else 1) / size) * math.cos(math.pi * (2 * i + 1) * u / (2 * size)) for i in range(size)]
        for u in range(size)
    ]
    return torch.tensor(values, dtype=torch.float64).float()


def to_frequency(matrix: Tensor, block: BlockShape) -> Tensor:
    """The coefficients of a matrix (rows, columns), whose blocks have ``(rows, height, width)``."""
    return _transformed(matrix, block, [cosines(side) for side in block])


def to_space(coefficients: Tensor, block: BlockShape) -> Tensor:
    """The matrix (rows, columns) of its coefficients: the inverse of :func:`to_frequency`."""
    return _transformed(coefficients, block, [cosines(side).t() for side in block])


def _transformed(matrix: Tensor, block: BlockShape, sides: list[Tensor]) -> Tensor:
    """Multiply each side of all blocks by its transform."""
    shape, (rows, height, width) = matrix.shape, block
    by_rows, by_height, by_width = (side.to(matrix) for side in sides)
    if width > 1:
        matrix = matrix.reshape(-1, width) @ by_width.t()
    if height > 1:
        matrix = by_height @ matrix.reshape(-1, height, width)
    if rows > 1:
        matrix = by_rows @ matrix.reshape(-1, rows, shape[1])
    return matrix.reshape(shape)
