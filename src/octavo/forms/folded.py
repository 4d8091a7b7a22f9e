"""Other ways to read a convolution's weight as a matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from octavo.forms.base import Form, child, elements, expect, form, nest

#: Filters ``n``, channels ``c``, height ``h`` and width ``w`` in the order of the folded matrix, and how many of them
#: make its rows. The fold ``n x (c h w)`` needs no form; the literature calls it channel.
FOLDS: dict[str, tuple[tuple[int, int, int, int], int]] = {
    "spatial": ((1, 2, 0, 3), 2),  # (c h) x (n w): h x 1 filters, then 1 x w
    "filter": ((2, 3, 0, 1), 2),  # (h w) x (n c): with n groups of columns every filter is factored alone
}


@form("folded")
@dataclass(frozen=True)
class Folded(Form):
    """A convolution's matrix of ``n`` rows and ``c * h * w`` columns, kept as another matrix of the same elements.

    Parameters
    ----------
    inner
        Form of the folded matrix, of the shape that :func:`fold` gives.
    fold
        ``spatial``, ``(c h) x (n w)``, or ``filter``, ``(h w) x (n c)``.
    kernel
        ``(c, h, w)``: channels, height and width.
    """

    inner: Form
    fold: str
    kernel: tuple[int, int, int]

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        elements = self.inner.shape[0] * self.inner.shape[1]
        columns = self.kernel[0] * self.kernel[1] * self.kernel[2]
        return (elements // columns, columns)

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        return nest(inner=self.inner)

    def meta(self) -> dict[str, Any]:  # noqa: D102
        return {"form": self.name, "fold": self.fold, "kernel": list(self.kernel), "inner": self.inner.meta()}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> Folded:  # noqa: D102
        which, (c, h, w) = meta["fold"], map(int, meta["kernel"])
        expect(which in FOLDS, f"unknown fold {which!r}; choose from {', '.join(FOLDS)}")
        expect(min(c, h, w) > 0 and c * h * w == shape[1], f"a kernel of {(c, h, w)} does not have {shape[1]} elements")
        return cls(child(tensors, meta, "inner", folded_shape(which, shape[0], (c, h, w))), which, (c, h, w))

    @classmethod
    def work(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> int:  # noqa: D102
        return 4 * elements(shape)

    def dense(self) -> Tensor:  # noqa: D102
        order, _ = FOLDS[self.fold]
        sizes = (self.shape[0], *self.kernel)
        back = [order.index(axis) for axis in range(4)]
        return self.inner.dense().reshape([sizes[axis] for axis in order]).permute(back).reshape(self.shape)


def fold(matrix: Tensor, which: str, kernel: tuple[int, int, int]) -> Tensor:
    """A convolution's matrix (n, c * h * w) in another fold; ``kernel`` is (c, h, w)."""
    order, _ = FOLDS[which]
    folded = matrix.reshape(len(matrix), *kernel).permute(order)
    return folded.reshape(folded_shape(which, len(matrix), kernel))


def folded_shape(which: str, rows: int, kernel: tuple[int, int, int]) -> tuple[int, int]:
    """Rows and columns of the folded matrix."""
    order, split = FOLDS[which]
    sizes = [(rows, *kernel)[axis] for axis in order]
    first = 1
    for size in sizes[:split]:
        first *= size
    return (first, rows * kernel[0] * kernel[1] * kernel[2] // first)
