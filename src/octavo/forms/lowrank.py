"""A product of two thin matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from octavo.forms.base import Form, child, elements, expect, form, nest


@form("lowrank")
@dataclass(frozen=True)
class LowRank(Form):
    """``weight = left @ right``.

    Parameters
    ----------
    left
        Form of shape (rows, rank).
    right
        Form of shape (rank, columns).
    """

    factored = True

    left: Form
    right: Form

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        return (self.left.shape[0], self.right.shape[1])

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        return nest(left=self.left, right=self.right)

    def meta(self) -> dict[str, Any]:  # noqa: D102
        rank = self.left.shape[1]
        return {"form": self.name, "rank": rank, "left": self.left.meta(), "right": self.right.meta()}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> LowRank:  # noqa: D102
        rank = int(meta["rank"])
        expect(0 < rank <= max(shape), f"rank {rank} does not fit a matrix of shape {shape}")
        return cls(child(tensors, meta, "left", (shape[0], rank)), child(tensors, meta, "right", (rank, shape[1])))

    @classmethod
    def work(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> int:  # noqa: D102
        return 4 * elements(shape)

    def grown(self, share: float, stored: Callable[[Form], int]) -> int:  # noqa: D102
        # The right factor belongs to the columns.
        return self.left.grown(share, stored) + stored(self.right)

    def dense(self) -> Tensor:  # noqa: D102
        return self.left.dense() @ self.right.dense()

    def apply(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.left.apply(self.right.apply(x))

    def lookup(self, index: Tensor) -> Tensor:  # noqa: D102
        return self.left.lookup(index) @ self.right.dense()
