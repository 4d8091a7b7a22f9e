"""Threshold: whatever exceeds one threshold, in multiples of it, with its places; both entropy-coded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from octavo.flows.base import flow
from octavo.flows.schema import Schema
from octavo.flows.updates.base import UpdateCodec
from octavo.flows.updates.codes import expect, pack_codes, pack_floats, unpack_codes, unpack_floats
from octavo.flows.updates.large import Large
from octavo.flows.updates.rounding import FINE

#: Of two bytes.
_MOST = (1 << 15) - 1
#: Doublings from the largest threshold, twice the largest float, down to the least.
_HIGHEST, _DOUBLINGS = 129, 278


@flow("threshold", source="Threshold quantization with feedback (Strom, 2015, Interspeech)")
@dataclass(frozen=True)
class Threshold(UpdateCodec):
    """Entries ``v`` of at least ``t`` in magnitude, as ``c = floor(|v| / t)`` and their sign.

    They stand for ``t (c + d)``, where ``d`` is the mean of what was rounded down. The amount sets ``t``, which is
    that of all tensors. From step to step it stays about the same, so that nothing has to be sorted: this is the
    fastest codec. It is biased: what lies below the threshold is lost without feedback.
    """

    parts: ClassVar[int] = 3
    doubling: ClassVar[int | None] = FINE

    def most(self, schema: Schema) -> int:
        """The least threshold."""
        return FINE * _DOUBLINGS

    def prepare(self, flat: Tensor, schema: Schema, choice: Mapping[str, Any], step: int) -> Large:
        """The entries from which thresholds take theirs."""
        return Large(flat)

    def pack(self, prepared: Large, schema: Schema, amount: int, choice: Mapping[str, Any]) -> Sequence[bytes]:
        """Gaps, codes, and the threshold with the mean of what was rounded down."""
        least = max(prepared.top / _MOST, torch.finfo(torch.float32).tiny)
        threshold = max(2.0 ** (_HIGHEST - amount / FINE), least)
        places, values = prepared.above(threshold)
        values = values.double() / threshold
        codes = values.abs().floor().clamp(1, _MOST)
        rest = float((values.abs() - codes).mean().clamp(0, 1)) if len(places) else 0.0
        floats = torch.tensor([threshold, rest], dtype=torch.float64)
        return *pack_codes(places, codes.copysign(values), schema.elements, _MOST), pack_floats(floats)

    def unpack(self, parts: Sequence[memoryview], schema: Schema, step: int) -> Tensor:
        """Zeros but for what was sent."""
        threshold, rest = unpack_floats(parts[2], 2)
        expect(bool((threshold > 0) & (rest >= 0)), "its threshold is not a positive number")
        places, codes = unpack_codes(parts, schema.elements, _MOST)
        values = (codes + rest.copysign(codes.float())) * threshold
        return torch.zeros(schema.elements).index_copy_(0, places, values)
