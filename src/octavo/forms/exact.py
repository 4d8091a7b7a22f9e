"""The form that stores a matrix bit for bit in fewer bytes: signs and exponents are entropy-coded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from octavo.forms.base import Form, elements, expect, expect_floats, expect_integers, form

#: By name: the integer type of the same width, and the bits of the mantissa.
_KINDS = {"float16": (torch.int16, 10), "bfloat16": (torch.int16, 7), "float32": (torch.int32, 23)}


@form("exact")
@dataclass(frozen=True)
class Exact(Form):
    """A matrix of floats without loss, as two integers per element.

    The bit pattern of a float is cut behind its exponent. Signs and exponents take few values, as weights of a layer
    have about the same size, so they are entropy-coded to 3 or 4 bits of 6 or 9. Mantissas are almost random, and are
    stored as they are.

    Parameters
    ----------
    weight
        (rows, columns), float32, float16 or bfloat16.
    """

    weight: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Self:
        """The form of a matrix, in the narrowest type that holds all its values exactly.

        Parameters
        ----------
        weight
            (rows, columns), float32.
        """
        for dtype in (torch.bfloat16, torch.float16):
            narrow = weight.to(dtype)
            if torch.equal(narrow.float(), weight):
                return cls(narrow)
        return cls(weight)

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        return (self.weight.shape[0], self.weight.shape[1])

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        integers, mantissa = _KINDS[_kind(self.weight)]
        bits = self.weight.contiguous().view(integers).int()
        high = (bits >> mantissa) & ((1 << (8 * self.weight.itemsize - mantissa)) - 1)
        return {"high": high.to(torch.int16), "low": (bits & ((1 << mantissa) - 1)).to(integers)}

    def meta(self) -> dict[str, Any]:  # noqa: D102
        return {"form": self.name, "dtype": _kind(self.weight)}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> Exact:  # noqa: D102
        expect(meta["dtype"] in _KINDS, f"floats of type {meta['dtype']!r} are not known")
        integers, mantissa = _KINDS[meta["dtype"]]
        for part, width in (("high", 8 * integers.itemsize - mantissa), ("low", mantissa)):
            values = expect_integers(tensors[part], shape, part)
            low, high = map(int, torch.aminmax(values)) if values.numel() else (0, 0)
            expect(0 <= low <= high < 1 << width, f"part {part!r} has values beyond {width} bits")
        bits = tensors["high"].int().bitwise_left_shift_(mantissa).bitwise_or_(tensors["low"])
        weight = bits.to(integers).view(getattr(torch, meta["dtype"]))
        return cls(expect_floats(weight, "high"))

    @classmethod
    def work(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> int:  # noqa: D102
        # Both parts and their union as 32-bit integers, the floats and a copy, and what testing them takes.
        return 24 * elements(shape)

    def dense(self) -> Tensor:  # noqa: D102
        return self.weight.float()

    def lookup(self, index: Tensor) -> Tensor:  # noqa: D102
        return self.weight[index].float()


def _kind(weight: Tensor) -> str:
    return str(weight.dtype).removeprefix("torch.")
