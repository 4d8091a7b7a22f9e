"""The form that stores the matrix itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from octavo.forms.base import Form, elements, expect, expect_floats, form


@form("dense")
@dataclass(frozen=True)
class Dense(Form):
    """A matrix kept in a floating dtype.

    Parameters
    ----------
    weight
        (rows, columns), float32, float16 or bfloat16.
    """

    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        return (self.weight.shape[0], self.weight.shape[1])

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        return {"weight": self.weight}

    def meta(self) -> dict[str, Any]:  # noqa: D102
        return {"form": self.name}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> Dense:  # noqa: D102
        weight = tensors["weight"]
        expect(tuple(weight.shape) == shape, f"dense part has shape {tuple(weight.shape)}, expected {shape}")
        return cls(expect_floats(weight, "weight"))

    @classmethod
    def work(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> int:  # noqa: D102
        # The check for infinities compares copies.
        return elements(shape) * (2 * tensors["weight"].dtype.itemsize + 8)

    def dense(self) -> Tensor:  # noqa: D102
        return self.weight.float()

    def lookup(self, index: Tensor) -> Tensor:  # noqa: D102
        return self.weight[index].float()
