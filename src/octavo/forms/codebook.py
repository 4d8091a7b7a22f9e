"""Indices into a small table of values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from octavo.forms.base import Form, apply_by_rows, elements, expect, expect_floats, expect_integers, form


@form("codebook")
@dataclass(frozen=True)
class Codebook(Form):
    """``weight[i, j] = scale[i] * values[codes[i, j]]``.

    Parameters
    ----------
    codes
        (rows, columns) unsigned integers below ``len(values)``.
    values
        (K,) floats.
    scale
        (rows, 1) floats, or None.
    """

    codes: Tensor
    values: Tensor
    scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        return (self.codes.shape[0], self.codes.shape[1])

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        parts = {"codes": self.codes, "values": self.values}
        return parts if self.scale is None else {**parts, "scale": self.scale}

    def meta(self) -> dict[str, Any]:  # noqa: D102
        return {"form": self.name}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> Codebook:  # noqa: D102
        codes = expect_integers(tensors["codes"], shape, "codes")
        values = expect_floats(tensors["values"], "values")
        expect(values.ndim == 1 and values.numel() >= 1, "a codebook needs at least one value")
        if codes.numel():
            low, high = int(codes.min()), int(codes.max())
            expect(low >= 0 and high < values.numel(), f"codes reach {low}..{high} in a codebook of {values.numel()}")
        scale = tensors.get("scale")
        if scale is not None:
            expect(
                tuple(scale.shape) == (shape[0], 1), f"scale has shape {tuple(scale.shape)}, expected {(shape[0], 1)}"
            )
            expect_floats(scale, "scale")
        return cls(codes, values, scale)

    @classmethod
    def work(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> int:  # noqa: D102
        return 20 * elements(shape) + 16 * tensors["values"].numel() + 4 * shape[0]

    def dense(self) -> Tensor:  # noqa: D102
        weight = self.values.float()[self.codes.long()]
        return weight if self.scale is None else weight * self.scale.float()

    def lookup(self, index: Tensor) -> Tensor:  # noqa: D102
        return Codebook(self.codes[index], self.values, None if self.scale is None else self.scale[index]).dense()

    def apply(self, x: Tensor) -> Tensor:  # noqa: D102
        return apply_by_rows(self, x)
