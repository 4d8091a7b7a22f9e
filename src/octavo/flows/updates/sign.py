"""Sign: one bit an entry, and one scale for each tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from octavo import coding
from octavo.flows.base import flow
from octavo.flows.schema import Schema
from octavo.flows.updates.base import UpdateCodec
from octavo.flows.updates.codes import expect, pack_floats, unpack_floats


@flow("sign", source="signSGD with error feedback (Karimireddy et al., 2019, arXiv 1901.09847)")
@dataclass(frozen=True)
class Sign(UpdateCodec):
    """``mean(|v|) sign(v)`` in every tensor. The codec is biased, and has one size: about a bit an entry."""

    parts: ClassVar[int] = 2

    def most(self, schema: Schema) -> int:
        """There is only one size."""
        return 0

    def pack(self, prepared: Tensor, schema: Schema, amount: int, choice: Mapping[str, Any]) -> Sequence[bytes]:
        """Signs as one coded tensor, and the scales as they are."""
        parts = prepared.split(schema.sizes)
        scales = torch.stack([part.double().abs().sum() / max(len(part), 1) for part in parts])
        return coding.encode(prepared < 0, independent=True), pack_floats(scales)

    def unpack(self, parts: Sequence[memoryview], schema: Schema, step: int) -> Tensor:
        """Signs times scales."""
        header = coding.describe(parts[0])
        expect(header.shape == (schema.elements,) and header.dtype == torch.bool, "it is not one sign an entry")
        scales = unpack_floats(parts[1], len(schema.sizes))
        expect(bool((scales >= 0).all()), "a scale is negative")
        signs = torch.where(coding.decode(parts[0], max_elements=schema.elements), -1.0, 1.0)
        return signs * scales.repeat_interleave(torch.tensor(schema.sizes))
