"""Blocks of ggml: the bytes that llama.cpp reads, as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from octavo.coding.ggml import block_type
from octavo.forms.base import Form, elements, expect, expect_integers, form

#: The largest float16.
_LARGEST = 65504.0


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
    """

    blocks: Tensor
    kind: str

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        found = block_type(self.kind)
        return len(self.blocks), self.blocks.shape[1] // found.bytes * found.block

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        return {"blocks": self.blocks}

    def meta(self) -> dict[str, Any]:  # noqa: D102
        return {"form": self.name, "kind": self.kind}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> GgmlBlocks:  # noqa: D102
        kind = block_type(meta["kind"])
        expect(shape[1] % kind.block == 0, f"{shape[1]} columns cannot be divided into blocks of {kind.block}")
        blocks = expect_integers(tensors["blocks"], (shape[0], kind.row_bytes(shape[1])), "blocks")
        expect(blocks.dtype == torch.uint8, f"part 'blocks' has dtype {blocks.dtype}, expected bytes")
        made = cls(blocks, kind.name)
        fields = kind.unpacked(blocks)
        heads = [fields.d] if fields.base is None else [fields.d, fields.base]
        expect(all(bool(torch.isfinite(head).all()) for head in heads), "part 'blocks' holds NaN or Inf")
        return made

    @classmethod
    def work(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> int:  # noqa: D102
        # Indices of levels take four bytes, values and their products four each.
        return elements(shape) * 20

    def scaled(self, factors: Tensor) -> GgmlBlocks:
        """The form with its rows multiplied by factors (rows,), rounded as blocks store their scales."""
        kind = block_type(self.kind)
        fields = kind.unpacked(self.blocks)

        def times(part: Tensor) -> Tensor:
            return (part.float() * factors[:, None]).clamp(-_LARGEST, _LARGEST).half()

        base = None if fields.base is None else times(fields.base)
        return replace(self, blocks=kind.packed(replace(fields, d=times(fields.d), base=base)))

    def dense(self) -> Tensor:  # noqa: D102
        return block_type(self.kind).dense(self.blocks)

    def lookup(self, index: Tensor) -> Tensor:  # noqa: D102
        return block_type(self.kind).dense(self.blocks[index])
