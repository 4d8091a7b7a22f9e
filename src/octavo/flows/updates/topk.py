"""Top-k: the entries of largest magnitude, quantized, with their places; both entropy-coded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from octavo import coding
from octavo.coding import Allowance
from octavo.errors import ArtifactError, RequestError
from octavo.flows.base import flow
from octavo.flows.schema import Schema
from octavo.flows.updates.base import UpdateCodec

#: Bytes of memory that decoding may take for every entry sent, and beside them.
_EACH, _BESIDE = 96, 1 << 20
#: Of one byte, without its last.
_MOST = 127


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
        object.__setattr__(self, "levels", tuple(self.levels))  # a plan from JSON brings a list
        if not self.levels or any(type(count) is not int or not 1 <= count <= _MOST for count in self.levels):
            raise RequestError(f"top-k: levels is {self.levels!r}; give whole numbers from 1 to {_MOST}")

    def choices(self) -> list[dict[str, Any]]:
        """Every number of levels."""
        return [{"levels": count} for count in self.levels]

    def most(self, schema: Schema) -> int:
        """All entries."""
        return schema.elements

    def pack(self, flat: Tensor, schema: Schema, amount: int, choice: Mapping[str, Any]) -> Sequence[bytes]:
        """Gaps, codes, and the steps of the tensors that have entries."""
        places, levels = _largest(flat, amount), choice["levels"]
        values, owner = flat[places], _owners(places, schema)
        top = torch.zeros(len(schema.names)).scatter_reduce(0, owner, values.abs(), "amax")
        codes = (values.double() * levels / top.double()[owner]).round()
        codes = torch.where(codes == 0, values.sign().double(), codes).clamp(-levels, levels)
        steps = _sums(values.double() * codes, owner, schema) / _sums(codes.square(), owner, schema)
        sent = steps[owner.unique()].float().clamp_min(torch.finfo(torch.float32).tiny)
        gaps = places.diff(prepend=torch.tensor([-1]))
        kind = torch.int32 if schema.elements < 1 << 31 else torch.int64
        return (
            coding.encode(gaps.to(kind)),
            coding.encode(codes.to(torch.int8)),
            sent.numpy().astype("<f4").tobytes(),
        )

    def unpack(self, parts: Sequence[memoryview], schema: Schema) -> Tensor:
        """Zeros but for what was sent."""
        count, most = coding.describe(parts[1]).elements, schema.elements
        _expect(count <= most and coding.describe(parts[0]).shape == (count,), f"{count} entries of {most}")
        _expect(
            len(parts[2]) % 4 == 0 and len(parts[2]) <= 4 * len(schema.names), "its steps are not as many as tensors"
        )
        allowance = Allowance(_EACH * count + _BESIDE)
        gaps, codes = (coding.decode(part, max_elements=count, allowance=allowance) for part in parts[:2])
        _expect(codes.dtype == torch.int8 and codes.shape == (count,), "its codes are not small integers")
        _expect(not count or (int(gaps.min()) >= 1 and int(gaps.max()) <= most), "a place is out of range")
        _expect(not count or bool(((codes != 0) & (codes != -128)).all()), "a code is out of range")
        places = gaps.long().cumsum(0) - 1
        _expect(not count or int(places[-1]) < most, "a place is out of range")
        steps = torch.from_numpy(np.frombuffer(parts[2], "<f4").astype(np.float32))
        owner = _owners(places, schema)
        tensors, which = owner.unique(return_inverse=True)
        _expect(len(tensors) == len(steps), f"{len(steps)} steps for {len(tensors)} tensors")
        _expect(bool((torch.isfinite(steps) & (steps > 0)).all()), "a step is not a positive number")
        return torch.zeros(most).index_copy_(0, places, codes * steps[which])


def _largest(flat: Tensor, amount: int) -> Tensor:
    """Places of the entries of largest magnitude, in order; of equal ones the first, and no zeros."""
    sizes = flat.abs()
    amount = min(amount, int(torch.count_nonzero(flat)))
    if not amount:
        return torch.zeros(0, dtype=torch.long)
    threshold = sizes.kthvalue(len(sizes) - amount + 1).values
    chosen = sizes > threshold
    level = (sizes == threshold).nonzero()[:, 0]
    chosen[level[: amount - int(chosen.sum())]] = True
    return chosen.nonzero()[:, 0]


def _owners(places: Tensor, schema: Schema) -> Tensor:
    """Numbers of the tensors in which places lie."""
    return torch.searchsorted(torch.tensor(schema.sizes).cumsum(0), places, right=True)


def _sums(values: Tensor, owner: Tensor, schema: Schema) -> Tensor:
    return torch.zeros(len(schema.names), dtype=torch.float64).index_add(0, owner, values)


def _expect(condition: bool, what: str) -> None:
    if not condition:
        raise ArtifactError(f"payload of top-k: {what}; send it again")
