"""Top-k: the entries of largest magnitude, quantized, with their places; both entropy-coded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from octavo.errors import RequestError
from octavo.flows.base import flow
from octavo.flows.schema import Schema
from octavo.flows.updates.base import UpdateCodec
from octavo.flows.updates.codes import counts, pack_scaled, unpack_scaled
from octavo.flows.updates.large import Large

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

    def prepare(self, flat: Tensor, schema: Schema, choice: Mapping[str, Any], step: int) -> Large:
        """The entries from which amounts take theirs."""
        return Large(flat)

    def pack(self, prepared: Large, schema: Schema, amount: int, choice: Mapping[str, Any]) -> Sequence[bytes]:
        """Gaps, codes, and the steps of the tensors that have entries."""
        places, values = prepared.largest(amount)
        levels, each, values = choice["levels"], counts(places, schema.sizes), values.double()
        tops = _reduced(np.maximum, values.abs(), each)
        codes = (values * (levels / tops).repeat_interleave(each)).round()
        codes = torch.where(codes == 0, values.sign(), codes).clamp(-levels, levels)
        steps = _reduced(np.add, values * codes, each) / _reduced(np.add, codes.square(), each)
        return pack_scaled(places, codes, steps, schema.sizes, _MOST)

    def unpack(self, parts: Sequence[memoryview], schema: Schema, step: int) -> Tensor:
        """Zeros but for what was sent."""
        return unpack_scaled(parts, schema.sizes, _MOST)


def _reduced(operation: np.ufunc, values: Tensor, each: Tensor) -> Tensor:
    """The maximum or sum of the values of every block, (blocks,) float64; 0 of a block that has none."""
    there = each > 0
    starts = (each.cumsum(0) - each)[there]
    found = torch.zeros(len(each), dtype=torch.float64)
    found[there] = torch.from_numpy(operation.reduceat(values.numpy(), starts.numpy()))
    return found
