"""Ternary: minus one, nought or one by chance, times one scale for each tensor."""

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

#: Doublings of the scale beyond the largest magnitude.
_BEYOND = 24


@flow("ternary", source="TernGrad (Wen et al., 2017, arXiv 1705.07878)")
@dataclass(frozen=True)
class Ternary(UpdateCodec):
    """``s sign(v)`` with chance ``|v| / s``, else 0; ``s`` is at least the largest magnitude of the tensor.

    The codec is unbiased: the mean over draws is ``v``. With the most bytes ``s`` is the largest magnitude, as in the
    source. The amount makes it up to 2^24 times larger, by the same factor for all tensors, so that fewer are sent.
    """

    parts: ClassVar[int] = 3
    doubling: ClassVar[int | None] = FINE
    unbiased: ClassVar[bool] = True

    feedback: bool = False

    def most(self, schema: Schema) -> int:
        """The smallest scale."""
        return FINE * _BEYOND

    def prepare(self, flat: Tensor, schema: Schema, choice: Mapping[str, Any], step: int) -> Drawn:
        """The largest magnitudes of the tensors, and draws."""
        top = torch.stack([part.abs().max() if len(part) else part.sum() for part in flat.split(schema.sizes)])
        return Drawn(flat, draws(flat, step), top.double())

    def pack(self, prepared: Drawn, schema: Schema, amount: int, choice: Mapping[str, Any]) -> Sequence[bytes]:
        """Gaps, signs and scales."""
        found = rounded(prepared, 2.0 ** (_BEYOND - amount / FINE), schema.sizes, 1)
        return pack_scaled(*found, schema.sizes, 1)

    def unpack(self, parts: Sequence[memoryview], schema: Schema, step: int) -> Tensor:
        """Signs times scales."""
        return unpack_scaled(parts, schema.sizes, 1)
