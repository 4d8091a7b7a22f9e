"""Integer codes with a separate grid for every group of columns, as in quantized checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from octavo.forms import scales, streams
from octavo.forms.base import Form, elements, expect, form

_ROUNDED = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
_CODES, _STEP, _OFFSET = "codes", "step", "offset"


@form("affine")
@dataclass(frozen=True)
class Affine(Form):
    """``weight[i, j] = step[i, g] * codes[i, j] + offset[i, g]`` with ``g = j // width``, in float32, then rounded.

    It restores the output of other quantizers bit for bit: product and sum are rounded separately, as in
    dequantization. Steps, offsets and codes are stored with the redundancy between them removed
    (:mod:`octavo.forms.scales`, :mod:`octavo.forms.streams`).

    Parameters
    ----------
    codes
        (rows, columns) int16.
    step
        (rows, groups) float32; groups divide the columns.
    offset
        The value of code 0, of the shape of ``step``, or None for zero.
    rounded
        Precision in which the weights were dequantized: float32, bfloat16 or float16.
    """

    codes: Tensor
    step: Tensor
    offset: Tensor | None = None
    rounded: torch.dtype = torch.float32
    #: Parts and numbers as stored, computed once.
    _stored: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        return (self.codes.shape[0], self.codes.shape[1])

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        self._store()
        return self._stored["parts"]

    def meta(self) -> dict[str, Any]:  # noqa: D102
        self._store()
        return self._stored["meta"]

    def _store(self) -> None:
        if self._stored:
            return
        meta: dict[str, Any] = {
            "form": self.name,
            "groups": self.step.shape[1],
            "rounded": str(self.rounded).removeprefix("torch."),
        }
        parts = {}
        levels = int(self.codes.abs().max())
        for name, found in (
            (_OFFSET, None if self.offset is None else scales.store(self.offset, 0)),
            (_STEP, scales.store(self.step, levels, self.offset)),
            (_CODES, streams.split(self.codes, self.step, self.offset)),
        ):
            if found is not None:
                meta[name] = found[1]
                parts.update({f"{name}/{part}": tensor for part, tensor in found[0].items()})
        self._stored.update(parts=parts, meta=meta)

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> Affine:  # noqa: D102
        odd = set(meta) - {"form", "groups", "rounded", _OFFSET, _STEP, _CODES, "_within"}
        expect(not odd, f"an affine form does not have {', '.join(map(repr, odd))[:200]}")
        groups, rounded = meta["groups"], meta["rounded"]
        expect(type(groups) is int and 0 < groups <= shape[1], f"{groups!r} groups do not fit {shape[1]} columns")
        expect(shape[1] % groups == 0, f"{shape[1]} columns are not divided evenly by {groups} groups")
        expect(isinstance(rounded, str) and rounded in _ROUNDED, f"weights cannot be rounded to {rounded!r}")

        def under(name: str) -> dict[str, Tensor]:
            return {key.removeprefix(f"{name}/"): part for key, part in tensors.items() if key.startswith(f"{name}/")}

        size = (shape[0], groups)
        offset = scales.load(under(_OFFSET), meta[_OFFSET], size) if _OFFSET in meta else None
        step = scales.load(under(_STEP), meta[_STEP], size, offset)
        codes = streams.join(under(_CODES), meta[_CODES], shape, step, offset)
        stored = {"parts": dict(tensors), "meta": {key: value for key, value in meta.items() if key != "_within"}}
        return cls(codes, step, offset, _ROUNDED[rounded], stored)

    def held(self) -> list[Tensor]:  # noqa: D102
        return list(self.tensors().values())

    @classmethod
    def work(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> int:  # noqa: D102
        n, groups = elements(shape), shape[0] * int(meta["groups"])
        # Codes twice (as floats and rounded), cells of some rows, and several 64-bit copies of steps and offsets.
        return 14 * n + 16 * streams.at_once(shape) + 256 * groups

    def dense(self) -> Tensor:  # noqa: D102
        grouped = self.codes.float().view(*self.step.shape, -1)
        grouped.mul_(self.step[..., None])
        if self.offset is not None:
            # Not fused with the product: both are rounded.
            grouped.add_(self.offset[..., None])
        return grouped.to(self.rounded).float().view(self.shape)
