"""Codes of short vectors: product, residual and additive codebooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.forms.base import Form, apply_by_rows, elements, expect, expect_floats, expect_integers, form


@form("vectors")
@dataclass(frozen=True)
class Vectors(Form):
    """``weight[i, block b] = scale[i, g] * sum_m values[m, b, codes[m, i, b]]`` for every block of columns.

    One book with a subspace per block is product quantization. Several books are residual or additive quantization.
    With one subspace, all blocks share the vectors.

    Parameters
    ----------
    codes
        (books, rows, blocks) unsigned integers below the number of entries.
    values
        (books, subspaces, entries, width) floats. Subspaces are 1, which all blocks share, or one for each block.
    columns
        Columns of the matrix, more than ``(blocks - 1) * width`` and at most ``blocks * width``; the last block may be
        narrower than its vectors.
    scale
        Floats of shape (1, 1), (rows, 1) or (rows, groups) that multiply equally wide groups of columns, or None.
    """

    codes: Tensor
    values: Tensor
    columns: int
    scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        return (self.codes.shape[1], self.columns)

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        parts = {"codes": self.codes, "values": self.values}
        return parts if self.scale is None else {**parts, "scale": self.scale}

    def meta(self) -> dict[str, Any]:  # noqa: D102
        return {"form": self.name, "columns": self.columns}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> Vectors:  # noqa: D102
        rows, columns = shape
        expect(meta["columns"] == columns, f"{meta['columns']} columns do not fit a matrix of shape {shape}")
        values = expect_floats(tensors["values"], "values")
        expect(values.ndim == 4, f"values have {values.ndim} dimensions, expected 4")
        books, subspaces, entries, width = values.shape
        expect(min(values.shape) > 0, f"values have shape {tuple(values.shape)}; no size may be 0")
        blocks = -(-columns // width)
        expect(subspaces in (1, blocks), f"{subspaces} subspaces for {blocks} blocks; expected 1 or {blocks}")
        codes = expect_integers(tensors["codes"], (books, rows, blocks), "codes")
        if codes.numel():
            low, high = int(codes.min()), int(codes.max())
            expect(low >= 0 and high < entries, f"codes reach {low}..{high} in books of {entries}")
        scale = tensors.get("scale")
        if scale is not None:
            expect_floats(scale, "scale")
            expect(scale.ndim == 2, f"scale has {scale.ndim} dimensions, expected 2")
            expect(scale.shape[0] in (1, rows), f"scale has {scale.shape[0]} rows for a matrix of {rows}")
            expect(1 <= scale.shape[1] <= max(columns, 1), f"scale has {scale.shape[1]} groups for {columns} columns")
        return cls(codes, values, columns, scale)

    @classmethod
    def work(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> int:  # noqa: D102
        values = tensors["values"]
        blocks = -(-shape[1] // max(values.shape[-1], 1))
        padded = shape[0] * blocks * values.shape[-1]
        scale = tensors.get("scale")
        spread = 0 if scale is None else 4 * scale.numel() + (4 * elements(shape) if scale.shape[-1] > 1 else 0)
        # The vectors in float32 and the check for infinities; places of one book as 64-bit numbers, with their starts;
        # vectors of one book, and the total.
        return 16 * values.numel() + 24 * shape[0] * blocks + 12 * padded + spread

    def grown(self, share: float, stored: Callable[[Form], int]) -> int:  # noqa: D102
        # Vectors belong to all rows, and floats are stored as they are.
        return round((stored(self) - self.values.nbytes) * share) + self.values.nbytes

    def dense(self) -> Tensor:  # noqa: D102
        books, subspaces, entries, width = self.values.shape
        starts = torch.arange(subspaces, device=self.codes.device) * entries
        whole = self.values.new_zeros(0)
        # One book at a time: all of them may take many times the memory of the matrix.
        for book in range(books):
            found = self.values[book].float().reshape(-1, width)[self.codes[book].long() + starts]
            whole = whole.add_(found) if book else found
        weight = whole.flatten(1)[:, : self.columns]
        if self.scale is None:
            return weight.contiguous()
        groups = self.scale.shape[1]
        scale = self.scale.float()
        if groups > 1:
            scale = scale.repeat_interleave(-(-self.columns // groups), 1)[:, : self.columns]
        return weight * scale

    def lookup(self, index: Tensor) -> Tensor:  # noqa: D102
        scale = self.scale
        if scale is not None and len(scale) > 1:
            scale = scale[index]
        return Vectors(self.codes[:, index], self.values, self.columns, scale).dense()

    def apply(self, x: Tensor) -> Tensor:  # noqa: D102
        return apply_by_rows(self, x)
