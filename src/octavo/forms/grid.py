"""Integer codes on a grid of steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.forms.base import Form, apply_by_rows, elements, expect, expect_floats, expect_integers, form

#: Row and column steps are powers of two with this many divisions per octave, so 9% apart. Rounding to the nearest
#: costs almost nothing, and the exponents are small integers that entropy-code to a few bits each.
DIVISIONS = 8
# Exact constants, not exp2(), so that every machine restores the same bits.
_FRACTIONS = torch.tensor([2.0 ** (k / DIVISIONS) for k in range(DIVISIONS)], dtype=torch.float64).float()


def exponent_steps(exponents: Tensor) -> Tensor:
    """``2 ** (exponents / DIVISIONS)`` as float32, the same bits everywhere."""
    exponents = exponents.long()
    whole = torch.div(exponents, DIVISIONS, rounding_mode="floor")
    return torch.ldexp(_FRACTIONS.to(exponents.device)[exponents - whole * DIVISIONS], whole)


@form("grid")
@dataclass(frozen=True)
class Grid(Form):
    """``weight[i, j] = scale[i, j // group] * (codes[i, j] - zero[i, j // group]) * 2^(row[i]/8) * 2^(column[j]/8)``.

    Parameters
    ----------
    codes
        (rows, columns) integers.
    scale
        Floats of shape (1, 1) per tensor, (rows, 1) per channel or (rows, groups) per group.
    zero
        Integers of the shape of ``scale``, or None.
    rows, columns
        Step exponents in eighths of an octave, int16 of shape (rows,) and (columns,), or None.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        return (self.codes.shape[0], self.codes.shape[1])

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        parts = {"codes": self.codes, "scale": self.scale, "zero": self.zero, "rows": self.rows}
        return {name: part for name, part in {**parts, "columns": self.columns}.items() if part is not None}

    def meta(self) -> dict[str, Any]:  # noqa: D102
        return {"form": self.name}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> Grid:  # noqa: D102
        scale = expect_floats(tensors["scale"], "scale")
        expect(scale.ndim == 2, f"scale has {scale.ndim} dimensions, expected 2")
        expect(scale.shape[0] in (1, shape[0]), f"scale has {scale.shape[0]} rows for a matrix of {shape[0]}")
        expect(1 <= scale.shape[1] <= max(shape[1], 1), f"scale has {scale.shape[1]} groups for {shape[1]} columns")
        zero, rows, columns = tensors.get("zero"), tensors.get("rows"), tensors.get("columns")
        if zero is not None:
            expect_integers(zero, tuple(scale.shape), "zero")
        for exponents, count, part in ((rows, shape[0], "rows"), (columns, shape[1], "columns")):
            if exponents is not None:
                expect_integers(exponents, (count,), part)
                bound = 126 * DIVISIONS
                expect(bool((exponents.long().abs() <= bound).all()), f"a step exponent in {part!r} is out of range")
        return cls(expect_integers(tensors["codes"], shape, "codes"), scale, zero, rows, columns)

    @classmethod
    def work(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> int:  # noqa: D102
        scale, n = tensors["scale"], elements(shape)
        # Codes as floats; scales and zero points per column where they are stored per group.
        spread = 4 * n if scale.shape[-1] > 1 else 0
        return 4 * n + 3 * spread + 32 * (scale.numel() + sum(shape))

    def dense(self) -> Tensor:  # noqa: D102
        columns, groups = self.codes.shape[1], self.scale.shape[1]

        def spread(part: Tensor) -> Tensor:
            """Per-group values as per-column values."""
            part = part.float()
            return part if groups == 1 else part.repeat_interleave(-(-columns // groups), 1)[:, :columns]

        steps = spread(self.scale)
        if self.rows is not None:
            steps = steps * exponent_steps(self.rows)[:, None]
        weight = self.codes.float() if self.zero is None else self.codes.float().sub_(spread(self.zero))
        weight.mul_(steps)
        return weight if self.columns is None else weight.mul_(exponent_steps(self.columns)[None])

    def lookup(self, index: Tensor) -> Tensor:  # noqa: D102
        scale, zero, rows = self.scale, self.zero, self.rows
        if len(scale) > 1:
            scale, zero = scale[index], None if zero is None else zero[index]
        return Grid(self.codes[index], scale, zero, None if rows is None else rows[index], self.columns).dense()

    def apply(self, x: Tensor) -> Tensor:  # noqa: D102
        return apply_by_rows(self, x)
