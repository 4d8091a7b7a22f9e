"""A form whose rows are scaled slightly, by factors finer than the steps of a grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.forms.base import Form, child, elements, expect, expect_integers, form, nest

#: Gains are powers of two with this many divisions per octave: 0.5% apart.
GAIN_DIVISIONS = 128
#: Up to an octave either way; the rounding error of a row that gains correct is a few percent.
LARGEST_GAIN = GAIN_DIVISIONS
# Python's own power of exact doubles, not a vectorised one: every machine restores the same bits.
_FACTORS = torch.tensor([2.0 ** (k / GAIN_DIVISIONS) for k in range(-LARGEST_GAIN, LARGEST_GAIN + 1)]).float()


@form("scaled")
@dataclass(frozen=True)
class Scaled(Form):
    """``weight[i] = 2 ** (gains[i] / 128) * base[i]``.

    Parameters
    ----------
    base
        The form that is scaled.
    gains
        (rows,) integers between -128 and 128.
    """

    base: Form
    gains: Tensor

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        return self.base.shape

    @property
    def factors(self) -> Tensor:
        """(rows,) float32 factors of the rows."""
        return _FACTORS.to(self.gains.device)[self.gains.long() + LARGEST_GAIN]

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        return {**nest(base=self.base), "gains": self.gains}

    def meta(self) -> dict[str, Any]:  # noqa: D102
        return {"form": self.name, "base": self.base.meta()}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> Scaled:  # noqa: D102
        gains = expect_integers(tensors["gains"], (shape[0],), "gains")
        within = (gains >= -LARGEST_GAIN) & (gains <= LARGEST_GAIN)
        expect(bool(within.all()), f"a gain is outside of -{LARGEST_GAIN}..{LARGEST_GAIN}")
        return cls(child(tensors, meta, "base", shape), gains)

    @classmethod
    def work(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> int:  # noqa: D102
        return 4 * elements(shape) + 16 * shape[0]

    def dense(self) -> Tensor:  # noqa: D102
        weight, factors = self.base.dense(), self.factors[:, None]
        # In place, which is several times as fast, unless the base gives a view of what it holds.
        memory = weight.untyped_storage().data_ptr()
        held = any(memory == part.untyped_storage().data_ptr() for part in self.base.held())
        return weight * factors if held else weight.mul_(factors)

    def apply(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.base.apply(x) * self.factors.to(x.dtype)


def row_scaled(form: Form, factors: Tensor) -> Form:
    """A form with its rows multiplied by factors (rows,), each rounded to the nearest gain that can be stored.

    It is the form itself if none of them is worth a gain.
    """
    gains = (torch.log2(factors) * GAIN_DIVISIONS).round().clamp(-LARGEST_GAIN, LARGEST_GAIN).to(torch.int16)
    return Scaled(form, gains) if bool(gains.any()) else form
