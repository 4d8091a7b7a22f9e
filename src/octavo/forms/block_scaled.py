"""A form whose rows are scaled in groups of columns, by scales that are a form themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from octavo.forms.base import Form, apply_by_rows, child, elements, expect, form, nest


@form("block-scaled")
@dataclass(frozen=True)
class BlockScaled(Form):
    """``weight[i, j] = scales[i, j // group] * base[i, j]`` with ``group = ceil(columns / groups)``.

    Parameters
    ----------
    base
        Form of shape (rows, columns).
    scales
        Form of shape (rows, groups).
    """

    base: Form
    scales: Form

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        return self.base.shape

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        return nest(base=self.base, scales=self.scales)

    def meta(self) -> dict[str, Any]:  # noqa: D102
        groups = self.scales.shape[1]
        return {"form": self.name, "groups": groups, "base": self.base.meta(), "scales": self.scales.meta()}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> BlockScaled:  # noqa: D102
        groups = _groups(meta, shape)
        return cls(child(tensors, meta, "base", shape), child(tensors, meta, "scales", (shape[0], groups)))

    @classmethod
    def work(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> int:  # noqa: D102
        return 8 * elements(shape) + 4 * shape[0] * _groups(meta, shape)

    def dense(self) -> Tensor:  # noqa: D102
        return _spread(self.scales.dense(), self.shape[1]).mul_(self.base.dense())

    def lookup(self, index: Tensor) -> Tensor:  # noqa: D102
        return _spread(self.scales.lookup(index), self.shape[1]).mul_(self.base.lookup(index))

    def apply(self, x: Tensor) -> Tensor:  # noqa: D102
        return apply_by_rows(self, x)


def _groups(meta: Mapping[str, Any], shape: tuple[int, int]) -> int:
    groups = meta["groups"]
    expect(type(groups) is int and 1 <= groups <= max(shape[1], 1), f"{groups!r} groups for {shape[1]} columns")
    return int(groups)


def _spread(scales: Tensor, columns: int) -> Tensor:
    """Scales (rows, groups) as (rows, columns), in memory of its own."""
    return scales.repeat_interleave(-(-columns // scales.shape[1]), 1)[:, :columns].contiguous()
