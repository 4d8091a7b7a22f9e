"""Low-rank products of equal groups of columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.forms.base import Form, child, elements, expect, form, nest


@form("grouped-lowrank")
@dataclass(frozen=True)
class GroupedLowRank(Form):
    """``weight = [U_1 V_1, ..., U_k V_k]``: columns in ``k`` equal groups, all of the same rank ``j``.

    For a convolution this is a grouped convolution (``k`` groups of channels) followed by a 1 x 1 convolution. With one
    group it is :class:`octavo.forms.LowRank`.

    Parameters
    ----------
    left
        Form of shape (rows, k * j): ``[U_1, ..., U_k]``.
    right
        Form of shape (k * j, columns / k): ``V_1`` to ``V_k``, one below the other.
    groups
        ``k``; it divides the columns.
    """

    factored = True

    left: Form
    right: Form
    groups: int

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        return (self.left.shape[0], self.right.shape[1] * self.groups)

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        return nest(left=self.left, right=self.right)

    def meta(self) -> dict[str, Any]:  # noqa: D102
        rank = self.left.shape[1] // self.groups
        sizes = {"groups": self.groups, "rank": rank}
        return {"form": self.name, **sizes, "left": self.left.meta(), "right": self.right.meta()}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> GroupedLowRank:  # noqa: D102
        groups, rank = int(meta["groups"]), int(meta["rank"])
        expect(groups > 0 and shape[1] % groups == 0, f"{groups} groups do not divide {shape[1]} columns")
        width = shape[1] // groups
        expect(0 < rank <= max(shape[0], width), f"rank {rank} does not fit groups of shape {(shape[0], width)}")
        left = child(tensors, meta, "left", (shape[0], groups * rank))
        return cls(left, child(tensors, meta, "right", (groups * rank, width)), groups)

    @classmethod
    def work(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> int:  # noqa: D102
        # The left factors by group, the products of the groups, and their concatenation.
        return 8 * elements(shape) + 4 * shape[0] * int(meta["groups"]) * int(meta["rank"])

    def grown(self, share: float, stored: Callable[[Form], int]) -> int:  # noqa: D102
        return self.left.grown(share, stored) + stored(self.right)

    def dense(self) -> Tensor:  # noqa: D102
        return self._joined(self.left.dense())

    def lookup(self, index: Tensor) -> Tensor:  # noqa: D102
        return self._joined(self.left.lookup(index))

    def apply(self, x: Tensor) -> Tensor:  # noqa: D102
        width = self.right.shape[1]
        right = self.right.dense().to(x.dtype).unflatten(0, (self.groups, -1))
        # One product per group; matmul would first copy the factors for every input.
        inner = torch.bmm(x.reshape(-1, self.groups, width).transpose(0, 1), right.mT)
        return self.left.apply(inner.transpose(0, 1).reshape(*x.shape[:-1], self.left.shape[1]))

    def _joined(self, left: Tensor) -> Tensor:
        lefts = left.unflatten(1, (self.groups, -1)).transpose(0, 1)
        return (lefts @ self.right.dense().unflatten(0, (self.groups, -1))).transpose(0, 1).flatten(1)
