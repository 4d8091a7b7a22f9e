"""Rows assigned to blocks, each block with its own form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from octavo.forms.base import Form, child, elements, expect, expect_integers, form, nest

#: The index of a block is one byte.
MOST_BLOCKS = 256


@form("row-blocks")
@dataclass(frozen=True)
class RowBlocks(Form):
    """A matrix whose row ``i`` is the next unread row of block ``member[i]``.

    With a :class:`octavo.forms.LowRank` in every block, each of its own rank, this is the block low-rank form of
    GroupReduce.

    Parameters
    ----------
    member
        (rows,) uint8, the block of every row.
    blocks
        A form for each block, with one row for each of its members; at least one block.
    """

    factored = True

    member: Tensor
    blocks: tuple[Form, ...]

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        return (len(self.member), self.blocks[0].shape[1])

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        return {"member": self.member, **nest(**self._named())}

    def meta(self) -> dict[str, Any]:  # noqa: D102
        inner = {name: block.meta() for name, block in self._named().items()}
        return {"form": self.name, "blocks": len(self.blocks), **inner}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> RowBlocks:  # noqa: D102
        count = int(meta["blocks"])
        expect(0 < count <= MOST_BLOCKS, f"{count} blocks; expected 1 to {MOST_BLOCKS}")
        member = expect_integers(tensors["member"], (shape[0],), "member")
        # Checked before counting, which allocates memory for every number up to the largest.
        expect(0 <= int(member.min()) <= int(member.max()) < count, f"a row belongs to none of the {count} blocks")
        sizes = member.long().bincount(minlength=count).tolist()
        expect(min(sizes) > 0, f"some of the {count} blocks have no rows")
        blocks = [child(tensors, meta, f"block{number}", (size, shape[1])) for number, size in enumerate(sizes)]
        return cls(member.to(torch.uint8), tuple(blocks))

    @classmethod
    def work(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> int:  # noqa: D102
        return 8 * elements(shape) + 64 * shape[0]

    def grown(self, share: float, stored: Callable[[Form], int]) -> int:  # noqa: D102
        return round(len(self.member) * share) + sum(block.grown(share, stored) for block in self.blocks)

    def dense(self) -> Tensor:  # noqa: D102
        return torch.cat([block.dense() for block in self.blocks])[self._places]

    def held(self) -> list[Tensor]:  # noqa: D102
        return [*super().held(), self._places]

    def lookup(self, index: Tensor) -> Tensor:  # noqa: D102
        member, places = self.member[index].long(), self._places[index]
        first, rows = 0, torch.empty(len(index), self.shape[1], dtype=torch.float32, device=member.device)
        for number, block in enumerate(self.blocks):
            here = member == number
            if bool(here.any()):
                rows[here] = block.lookup(places[here] - first)
            first += block.shape[0]
        return rows

    def apply(self, x: Tensor) -> Tensor:  # noqa: D102
        return torch.cat([block.apply(x) for block in self.blocks], -1)[..., self._places]

    def _named(self) -> dict[str, Form]:
        return {f"block{number}": block for number, block in enumerate(self.blocks)}

    @cached_property
    def _places(self) -> Tensor:
        """The position of every row when the blocks are stacked."""
        return self.member.argsort(stable=True).argsort().int()
