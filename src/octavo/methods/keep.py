"""No compression, or a 16-bit dtype: a matrix kept as floats."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.forms import Dense, Form
from octavo.methods.base import Method, Setting, method
from octavo.methods.knobs import choice

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@method("keep", family="keep", preset="fast", source="IEEE 754 and bfloat16")
@dataclass(frozen=True)
class Keep(Method):
    """The matrix itself, in float32, bfloat16 (8 bits of precision, any range) or float16 (11 bits, below 65504)."""

    by_rows = True
    takes = ("dtype",)
    dense = True
    words = MappingProxyType({name: {"dtype": name} for name in _DTYPES})

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """All dtypes that hold the weights."""
        return [{"dtype": name} for name, dtype in _DTYPES.items() if _largest(weight) < torch.finfo(dtype).max]

    def kernel_settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """bfloat16, the dtype of models whose other weights are packed."""
        return [{"dtype": "bfloat16"}] if _largest(weight) < torch.finfo(torch.bfloat16).max else []

    def speed_settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """16 bits where they hold the weights: what is not multiplied with is stored in them."""
        return [{"dtype": "float16" if _largest(weight) < torch.finfo(torch.float16).max else "float32"}]

    def encode(self, weight: Tensor, setting: Setting, evidence: Evidence) -> Form:  # noqa: D102
        name = choice(self.name, setting, "dtype", tuple(_DTYPES))
        dtype, largest = _DTYPES[name], _largest(weight)
        if not largest < torch.finfo(dtype).max:
            raise RequestError(
                f"{self.name}: a weight of {largest:g} exceeds the largest {name}, {torch.finfo(dtype).max:g}; use "
                "bfloat16 or float32"
            )
        return Dense(weight.to(dtype))


def _largest(weight: Tensor) -> float:
    return float(weight.abs().max()) if weight.numel() else 0.0
