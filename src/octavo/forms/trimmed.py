"""A matrix without the rows and columns that were removed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.forms.base import Form, child, elements, expect, expect_integers, form, nest


@form("cut")
@dataclass(frozen=True)
class Trimmed(Form):
    """``weight[i, j]`` is the next element of ``inner`` where row ``i`` and column ``j`` are kept, and 0 elsewhere.

    Each removed neuron, head or channel costs one bit, and the module keeps its shapes.

    Parameters
    ----------
    inner
        Form of shape (kept rows, kept columns).
    rows, columns
        (rows,) and (columns,) bools, True where kept; at least one each.
    """

    inner: Form
    rows: Tensor
    columns: Tensor

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        return (len(self.rows), len(self.columns))

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        masks = {"rows": self.rows, "columns": self.columns}
        return {**{name: mask.to(torch.uint8) for name, mask in masks.items()}, **nest(inner=self.inner)}

    def meta(self) -> dict[str, Any]:  # noqa: D102
        return {"form": self.name, "inner": self.inner.meta()}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> Trimmed:  # noqa: D102
        rows = expect_integers(tensors["rows"], (shape[0],), "rows").bool()
        columns = expect_integers(tensors["columns"], (shape[1],), "columns").bool()
        expect(bool(rows.any()) and bool(columns.any()), "no row or no column is kept")
        return cls(child(tensors, meta, "inner", (int(rows.sum()), int(columns.sum()))), rows, columns)

    @classmethod
    def work(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> int:  # noqa: D102
        return 8 * elements(shape) + 32 * sum(shape)

    def dense(self) -> Tensor:  # noqa: D102
        inner = self.inner.dense()
        wide = inner.new_zeros(len(inner), len(self.columns)).index_copy_(1, self.columns.nonzero()[:, 0], inner)
        return inner.new_zeros(self.shape).index_copy_(0, self.rows.nonzero()[:, 0], wide)

    def lookup(self, index: Tensor) -> Tensor:  # noqa: D102
        kept, places = self.rows[index], (self.rows.cumsum(0) - 1)[index]
        found = self.inner.lookup(places[kept])
        wide = found.new_zeros(len(found), len(self.columns)).index_copy(1, self.columns.nonzero()[:, 0], found)
        return found.new_zeros(len(index), len(self.columns)).index_copy(0, kept.nonzero()[:, 0], wide)

    def apply(self, x: Tensor) -> Tensor:  # noqa: D102
        out = self.inner.apply(x[..., self.columns])
        return out.new_zeros(*x.shape[:-1], len(self.rows)).index_copy(-1, self.rows.nonzero()[:, 0], out)
