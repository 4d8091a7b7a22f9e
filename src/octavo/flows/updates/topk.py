"""Top-k: the entries of largest magnitude, quantized, with their places; both entropy-coded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from octavo.errors import RequestError
from octavo.flows.base import flow
from octavo.flows.schema import Schema
from octavo.flows.updates.base import UpdateCodec
from octavo.flows.updates.codes import owners, pack_scaled, sums, tops, unpack_scaled

#: Of one byte, without its last.
_MOST = 127
#: Entries of a sample, and how many of them beyond its share make it sure that enough others are as large.
_SAMPLE, _SURE = 1 << 14, 64


@flow("top-k", source="Sparsified updates with error feedback (Stich et al., 2018, arXiv 1809.07599)")
@dataclass(frozen=True)
class TopK(UpdateCodec):
    """Entries of largest magnitude of all tensors together, on a grid with a step for each tensor.

    With ``m`` the largest magnitude that is sent of a tensor, its entries ``v`` become ``c = round(v levels / m)``, at
    least 1 in magnitude. They stand for ``s c``, where ``s = sum(v c) / sum(c^2)`` is the step of least squared error.
    Places are stored as gaps from one to the next. The codec is biased: what it leaves out is lost without feedback.

    Parameters
    ----------
    levels
        Numbers of magnitudes that a code can have, of which a fit takes the best; 1 sends signs.
    """

    parts: ClassVar[int] = 3

    levels: tuple[int, ...] = (1, 3, 7, 15, 31, 63, 127)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "levels", tuple(self.levels))  # a plan from JSON brings a list
        if not self.levels or any(type(count) is not int or not 1 <= count <= _MOST for count in self.levels):
            raise RequestError(f"top-k: levels is {self.levels!r}; give whole numbers from 1 to {_MOST}")

    def choices(self) -> list[dict[str, Any]]:
        """Every number of levels."""
        return [{"levels": count} for count in self.levels]

    def most(self, schema: Schema) -> int:
        """All entries."""
        return schema.elements

    def pack(self, prepared: Tensor, schema: Schema, amount: int, choice: Mapping[str, Any]) -> Sequence[bytes]:
        """Gaps, codes, and the steps of the tensors that have entries."""
        places, levels, blocks = largest(prepared, amount), choice["levels"], len(schema.sizes)
        values, owner = prepared[places], owners(places, schema.sizes)
        codes = (values.double() * levels / tops(values, owner, blocks).double()[owner]).round()
        codes = torch.where(codes == 0, values.sign().double(), codes).clamp(-levels, levels)
        steps = sums(values.double() * codes, owner, blocks) / sums(codes.square(), owner, blocks)
        return pack_scaled(places, codes, steps, schema.sizes, _MOST)

    def unpack(self, parts: Sequence[memoryview], schema: Schema, step: int) -> Tensor:
        """Zeros but for what was sent."""
        return unpack_scaled(parts, schema.sizes, _MOST)


def largest(flat: Tensor, amount: int) -> Tensor:
    """Places of the entries of largest magnitude, in order; of equal ones the first, and no zeros."""
    sizes = flat.abs()
    amount = min(amount, int(torch.count_nonzero(flat)))
    if not amount:
        return torch.zeros(0, dtype=torch.long)
    # Few entries are looked at twice: those that are large beside a sample.
    places = (sizes >= _below(sizes, amount)).nonzero()[:, 0]
    places = places if len(places) >= amount else flat.nonzero()[:, 0]
    few = sizes[places]
    threshold = few.kthvalue(len(few) - amount + 1).values
    chosen = few > threshold
    level = (few == threshold).nonzero()[:, 0]
    chosen[level[: amount - int(chosen.sum())]] = True
    return places[chosen]


def _below(sizes: Tensor, amount: int) -> float:
    """A size that so many entries exceed, most likely; 0 where that is not sure."""
    sample = sizes[:: -(-len(sizes) // _SAMPLE)]
    rank = math.ceil(1.1 * amount / len(sizes) * len(sample)) + _SURE
    return float(sample.kthvalue(len(sample) - rank + 1).values) if rank <= len(sample) else 0.0


def largest_each(flat: Tensor, sizes: Sequence[int], amount: int) -> Tensor:
    """Places as of :func:`largest`, of every block about the same share; together ``amount`` but for rounding."""
    share, start, found = amount / max(len(flat), 1), 0, [torch.zeros(0, dtype=torch.long)]
    for size, part in zip(sizes, flat.split(list(sizes)), strict=True):
        found.append(start + largest(part, round(share * size)))
        start += size
    return torch.cat(found)
