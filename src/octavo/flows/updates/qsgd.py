"""QSGD: stochastic rounding to multiples of a share of each tensor's norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from octavo.flows.base import flow
from octavo.flows.schema import Schema
from octavo.flows.updates.base import UpdateCodec
from octavo.flows.updates.codes import pack_scaled, unpack_scaled
from octavo.flows.updates.rounding import FINE, Drawn, draws, rounded

#: Doublings of the levels below and above one.
_BELOW, _ABOVE = 16, 14
#: The largest code: that of an entry which is the whole norm.
_MOST = 1 << _ABOVE


@flow("qsgd", source="QSGD (Alistarh et al., 2017, arXiv 1610.02132)")
@dataclass(frozen=True)
class QSGD(UpdateCodec):
    """An entry ``v`` becomes ``v s / norm``, rounded up or down by chance; ``s`` levels are those of all tensors.

    The codec is unbiased: the mean over draws is ``v``. The amount sets ``s``, from 2^-16 to 2^14. The source has whole
    numbers; below 1, an entry is sent with chance ``|v| s / norm``. Fewer bytes have larger errors, also far larger
    than the update. Codes that are not zero are entropy-coded with their places.
    """

    parts: ClassVar[int] = 3
    doubling: ClassVar[int | None] = FINE
    unbiased: ClassVar[bool] = True

    feedback: bool = False

    def most(self, schema: Schema) -> int:
        """The most levels."""
        return FINE * (_BELOW + _ABOVE)

    def prepare(self, flat: Tensor, schema: Schema, choice: Mapping[str, Any], step: int) -> Drawn:
        """The norms of the tensors, and draws."""
        norms = torch.stack([part.double().norm() for part in flat.split(schema.sizes)])
        return Drawn(flat, draws(flat, step), norms)

    def pack(self, prepared: Drawn, schema: Schema, amount: int, choice: Mapping[str, Any]) -> Sequence[bytes]:
        """Gaps, codes and steps."""
        found = rounded(prepared, 2.0 ** (_BELOW - amount / FINE), schema.sizes, _MOST)
        return pack_scaled(*found, schema.sizes, _MOST)

    def unpack(self, parts: Sequence[memoryview], schema: Schema, step: int) -> Tensor:
        """Codes times steps."""
        return unpack_scaled(parts, schema.sizes, _MOST)
