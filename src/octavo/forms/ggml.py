"""Blocks of ggml: the bytes that llama.cpp reads, as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from octavo.coding.ggml import block_type
from octavo.forms.base import Form, expect, expect_integers, form

#: The largest float16, and the columns of the largest block.
_LARGEST, _LONGEST = 65504.0, 256


@form("ggml")
@dataclass(frozen=True)
class GgmlBlocks(Form):
    """A matrix in one of ggml's block types (:mod:`octavo.coding.ggml`).

    Parameters
    ----------
    blocks
        (rows, bytes of a row) uint8.
    kind
        Name of the type, such as ``q4_k``.
    columns
        Columns of the matrix; a last block may go beyond them, but llama.cpp reads whole blocks only.
    """

    blocks: Tensor
    kind: str
    columns: int

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        return len(self.blocks), self.columns

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        return {"blocks": self.blocks}

    def meta(self) -> dict[str, Any]:  # noqa: D102
        return {"form": self.name, "kind": self.kind, "columns": self.columns}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> GgmlBlocks:  # noqa: D102
        kind = block_type(meta["kind"])
        expect(meta["columns"] == shape[1], f"blocks of {meta['columns']!r} columns are not a matrix of {shape[1]}")
        length = -(-shape[1] // kind.block) * kind.bytes
        blocks = expect_integers(tensors["blocks"], (shape[0], length), "blocks")
        expect(blocks.dtype == torch.uint8, f"part 'blocks' has dtype {blocks.dtype}, expected bytes")
        made = cls(blocks, kind.name, shape[1])
        fields = kind.unpacked(blocks)
        heads = [fields.d] if fields.base is None else [fields.d, fields.base]
        expect(all(bool(torch.isfinite(head).all()) for head in heads), "part 'blocks' holds NaN or Inf")
        return made

    @classmethod
    def work(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> int:  # noqa: D102
        # Indices of levels take four bytes, values and their products four each.
        return shape[0] * (shape[1] + _LONGEST) * 20

    def scaled(self, factors: Tensor) -> GgmlBlocks:
        """The form with its blocks multiplied by factors (rows, blocks), rounded as they store their scales."""
        kind = block_type(self.kind)
        fields = kind.unpacked(self.blocks)

        def times(part: Tensor) -> Tensor:
            return (part.float() * factors).clamp(-_LARGEST, _LARGEST).half()

        base = None if fields.base is None else times(fields.base)
        return replace(self, blocks=kind.packed(replace(fields, d=times(fields.d), base=base)))

    def dense(self) -> Tensor:  # noqa: D102
        return block_type(self.kind).dense(self.blocks)[:, : self.columns]

    def lookup(self, index: Tensor) -> Tensor:  # noqa: D102
        return block_type(self.kind).dense(self.blocks[index])[:, : self.columns]
