"""Points of the lattice E8, eight columns each, without the bit that every point's parity saves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.forms.base import Form, apply_by_rows, elements, expect, expect_integers, form

#: Columns of a block.
WIDTH = 8
#: Largest coordinate, so that sums of a block stay exact.
_LARGEST = 1 << 30


@form("e8")
@dataclass(frozen=True)
class E8(Form):
    """``weight[i, 8 b + j] = x[j] + half[i, b] / 2``, with whole ``x`` whose sum is even.

    These are the points of E8. The last ``x`` of a block is twice ``last`` plus what makes the sum even.

    Parameters
    ----------
    first
        (rows, 7 blocks) integers: the first seven ``x`` of every block.
    last
        (rows, blocks) integers.
    half
        (rows, blocks) bools.
    columns
        Columns of the matrix; those of the last block beyond it are padding.
    """

    first: Tensor
    last: Tensor
    half: Tensor
    columns: int

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        return (self.first.shape[0], self.columns)

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        return {"first": self.first, "last": self.last, "half": self.half}

    def meta(self) -> dict[str, Any]:  # noqa: D102
        return {"form": self.name}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> E8:  # noqa: D102
        rows, blocks = shape[0], -(-shape[1] // WIDTH)
        first = expect_integers(tensors["first"], (rows, (WIDTH - 1) * blocks), "first")
        last = expect_integers(tensors["last"], (rows, blocks), "last")
        for part, name in ((first, "first"), (last, "last")):
            low, high = map(int, torch.aminmax(part)) if part.numel() else (0, 0)
            expect(-_LARGEST <= low <= high <= _LARGEST, f"part {name!r} reaches {low}..{high}")
        half = tensors["half"]
        expect(half.dtype == torch.bool, f"part 'half' has dtype {half.dtype}, expected bools")
        expect(tuple(half.shape) == (rows, blocks), f"part 'half' has shape {tuple(half.shape)}")
        return cls(first, last, half, shape[1])

    @classmethod
    def work(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> int:  # noqa: D102
        return 20 * shape[0] * WIDTH * -(-shape[1] // WIDTH) + 4 * elements(shape)

    def dense(self) -> Tensor:  # noqa: D102
        return _points(self.first, self.last, self.half)[:, : self.columns]

    def lookup(self, index: Tensor) -> Tensor:  # noqa: D102
        return _points(self.first[index], self.last[index], self.half[index])[:, : self.columns]

    def apply(self, x: Tensor) -> Tensor:  # noqa: D102
        return apply_by_rows(self, x)

    @classmethod
    def of(cls, points: Tensor, columns: int) -> E8:
        """The form of points (rows, 8 blocks) of the lattice, float."""
        blocks = points.view(len(points), -1, WIDTH)
        whole = blocks.floor()
        half = blocks[..., 0] != whole[..., 0]
        first = whole[..., :-1].flatten(1).to(torch.int32)
        last = (whole[..., -1] / 2).floor().to(torch.int32)
        return cls(_narrow(first), _narrow(last), half, columns)


def _points(first: Tensor, last: Tensor, half: Tensor) -> Tensor:
    rows, blocks = last.shape
    points = torch.empty(rows, blocks, WIDTH, dtype=torch.float32)
    points[..., :-1] = first.view(rows, blocks, WIDTH - 1)
    # In 64 bits, where neither sums nor twice a stored integer can overflow.
    odd = first.view(rows, blocks, WIDTH - 1).sum(2, dtype=torch.int64) & 1
    points[..., -1] = last.long() * 2 + odd
    return points.add_(half[..., None] * 0.5).flatten(1)


def _narrow(codes: Tensor) -> Tensor:
    fits = codes.numel() == 0 or (int(codes.min()) >= -128 and int(codes.max()) <= 127)
    return codes.to(torch.int8) if fits else codes
