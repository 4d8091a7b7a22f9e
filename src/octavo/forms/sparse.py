"""Positions of the kept weights, and their values in any other form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from octavo import coding
from octavo.forms.base import Form, child, elements, expect, expect_integers, form, nest


def _patterns(keep: int, group: int) -> Tensor:
    """All n:m masks in lexicographic order: (patterns, group) bools."""
    table = torch.zeros(len(list(combinations(range(group), keep))), group, dtype=torch.bool)
    for index, chosen in enumerate(combinations(range(group), keep)):
        table[index, list(chosen)] = True
    return table


@form("sparse")
@dataclass(frozen=True)
class Sparse(Form):
    """A mask and the kept values, as a 1 x kept matrix in row-major order, in a nested form.

    The mask is stored in one of three ways: one bit per weight, gaps between kept weights, or (n:m sparsity) one
    pattern number per group of ``m`` columns.

    Parameters
    ----------
    mask
        (rows, columns) bools, True where a value is kept.
    values
        Form of shape (1, number of kept values).
    pattern
        ``(n, m)`` if every group of ``m`` columns keeps exactly ``n``, else None.
    stored_as
        ``mask`` or ``gaps``, how a mask without a pattern is stored; None for whichever is smaller. A restored form
        keeps what it was stored as, since which is smaller depends on the version of the coder.
    """

    mask: Tensor
    values: Form
    pattern: tuple[int, int] | None = None
    stored_as: str | None = None

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        return (self.mask.shape[0], self.mask.shape[1])

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        if self.pattern is not None:
            keep, group = self.pattern
            powers = 2 ** torch.arange(group)
            table = (_patterns(keep, group) * powers).sum(1)
            keys = (self.mask.view(-1, group) * powers).sum(1)
            index = torch.zeros(2**group, dtype=torch.uint8)
            index[table] = torch.arange(len(table), dtype=torch.uint8)
            where = {"patterns": index[keys]}
        else:
            positions = self.mask.flatten().nonzero().flatten()
            ways = {"mask": self.mask.to(torch.uint8), "gaps": torch.diff(positions, prepend=torch.tensor([-1])) - 1}
            way = self.stored_as or min(ways, key=lambda name: len(coding.encode(ways[name])))
            where = {way: ways[way]}
        return {**where, **nest(values=self.values)}

    def meta(self) -> dict[str, Any]:  # noqa: D102
        meta: dict[str, Any] = {"form": self.name, "kept": self.values.shape[1], "values": self.values.meta()}
        return meta if self.pattern is None else {**meta, "pattern": list(self.pattern)}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> Sparse:  # noqa: D102
        total, kept = shape[0] * shape[1], int(meta["kept"])
        expect(0 <= kept <= total, f"{kept} kept weights in a matrix of {total} weights")
        pattern = stored_as = None
        if "pattern" in meta:
            keep, group = (int(value) for value in meta["pattern"])
            expect(
                0 < keep <= group <= 8 and shape[1] % group == 0,
                f"pattern {keep}:{group} does not fit {shape[1]} columns",
            )
            pattern, table = (keep, group), _patterns(keep, group)
            index = expect_integers(tensors["patterns"], (total // group,), "patterns").long()
            expect(
                index.numel() == 0 or (int(index.min()) >= 0 and int(index.max()) < len(table)),
                "a pattern number is out of range",
            )
            mask = table[index].view(shape)
        elif "gaps" in tensors:
            gaps = expect_integers(tensors["gaps"], (kept,), "gaps").long()
            expect(kept == 0 or (int(gaps.min()) >= 0 and int(gaps.max()) < total), "a gap is out of range")
            positions = (gaps + 1).cumsum(0) - 1
            expect(kept == 0 or int(positions[-1]) < total, "gaps point beyond the matrix")
            mask = torch.zeros(total, dtype=torch.bool)
            mask[positions] = True
            mask, stored_as = mask.view(shape), "gaps"
        else:
            mask, stored_as = expect_integers(tensors["mask"], shape, "mask").bool(), "mask"
        # Summing would first convert every bit to a 64-bit integer.
        found = int(mask.count_nonzero())
        expect(found == kept, f"the mask keeps {found} weights, the manifest says {kept}")
        return cls(mask, child(tensors, meta, "values", (1, kept)), pattern, stored_as)

    @classmethod
    def work(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> int:  # noqa: D102
        n, group = elements(shape), int(meta["pattern"][1]) if "pattern" in meta else 0
        # Positions as 64-bit numbers: those of kept weights (several times if they come from gaps) and of patterns.
        kept = (40 if "gaps" in tensors else 20) * int(meta["kept"])
        return 6 * n + kept + (8 * n // group if group else 0)

    def dense(self) -> Tensor:  # noqa: D102
        weight = torch.zeros(self.mask.shape, dtype=torch.float32, device=self.mask.device)
        places = self.mask.flatten().nonzero()[:, 0]
        weight.view(-1).index_copy_(0, places, self.values.dense().flatten())
        return weight

    def lookup(self, index: Tensor) -> Tensor:  # noqa: D102
        mask, counts = self.mask[index], self.mask.sum(1)
        # The place of a row's first value, and of each after it.
        places = (counts.cumsum(0) - counts)[index][:, None] + mask.cumsum(1) - 1
        rows = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        return rows.masked_scatter(mask, self.values.dense()[0, places[mask]])
