"""Recovering the quantization grid of a group from its values.

A dequantized weight is ``x = round(step * code + offset)``, rounded to the precision that it was dequantized in.
Differences of values are multiples of the step, so the smallest is the step or a small multiple of it; that gives the
codes. Then each value bounds its step,

    (x - offset - h) / code <= step <= (x - offset + h) / code

with ``h`` half the spacing of floats at ``x``, and a number with a short mantissa within all bounds of a group is the
stored step. A result is accepted only if it reproduces the values bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

#: Mantissa bits of what steps are made of: bfloat16, float16, products of float16 with 6 and 7 bits, float32; and the
#: number of candidates around the middle of the bounds, if coarse rounding allows several.
_MANTISSAS = ((8, 0), (11, 3), (17, 0), (18, 0), (21, 0), (24, 1))
#: The smallest difference may be up to this many steps.
_MULTIPLES = 5
#: If rounding blurs differences, the largest code is guessed, from small to large.
_LARGEST = (*range(1, 33), 63, 64, 127, 128, 255)
_REFINEMENTS = 3
#: Differences below this share of a group's largest value are rounding errors of float32.
_NOISE = 2.0**-22
_LEVELS, _UNCERTAIN = 256, 64
#: A float16 offset that was rounded to bfloat16 with its sum may have been one of these neighbours.
_NEIGHBOURS = (0, -1, 1, -2, 2, -3, 3, -4, 4)
#: Lowest codes that may be missing in a group, and the bits of a float32 that a product of a float16 with 6 bits never
#: has.
_ABSENT, _LONG = 4, 0x3F
_PRECISION = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


@dataclass(frozen=True)
class Lattice:
    """Codes (groups, width) int16, steps and offsets (groups,) float32; offsets are None if all are zero."""

    codes: Tensor
    step: Tensor
    offset: Tensor | None

    def values(self, precision: torch.dtype) -> Tensor:
        """The weights as computed by dequantization."""
        offset = None if self.offset is None else self.offset[:, None]
        return _dequantized(self.codes.float(), self.step[:, None], offset, precision)


def precision_of(weight: Tensor) -> torch.dtype:
    """The narrowest precision that holds all values."""
    narrow = (torch.bfloat16, torch.float16)
    return next((dtype for dtype in narrow if torch.equal(weight.to(dtype).float(), weight)), torch.float32)


def find(groups: Tensor, precision: torch.dtype, *, offset: bool) -> Lattice | None:
    """The lattice of every group, or None if a group has none.

    Parameters
    ----------
    groups
        (groups, width) float32.
    precision
        The dtype of the dequantized values.
    offset
        Whether lattices have offsets; otherwise they contain zero.
    """
    found = _with_offset(groups, precision) if offset else _through_zero(groups, precision)
    bits = groups.contiguous().view(torch.int32)
    return found if found is not None and torch.equal(found.values(precision).view(torch.int32), bits) else None


def _through_zero(groups: Tensor, precision: torch.dtype) -> Lattice | None:
    size = groups.abs()
    codes, step, fits = _fitted(
        size, torch.nn.functional.pad(size, (1, 0)), torch.zeros_like(size[:, 0]), precision, _LEVELS
    )
    if not bool(fits.all()):
        return None
    # Zeros reveal the sign of a step: -0.0 is code zero times a negative step. Quantizers with signed steps give the
    # extreme the lowest code, since there is one more negative code.
    zero = groups == 0
    negative = (zero & torch.signbit(groups)).any(1)
    if bool(negative.any()):
        negative |= ~zero.any(1) & (groups.gather(1, size.argmax(1, keepdim=True))[:, 0] > 0)
    sign = torch.where(negative, -1.0, 1.0)
    return Lattice((torch.copysign(codes, groups) * sign[:, None]).to(torch.int16), step * sign, None)


def _with_offset(groups: Tensor, precision: torch.dtype) -> Lattice | None:
    """Code 0 is the smallest value."""
    low = groups.amin(1)
    spacing = torch.ldexp(torch.ones_like(low), torch.frexp(low)[1] - _PRECISION[torch.float16])
    codes, steps, offsets = torch.zeros_like(groups), torch.zeros_like(low), low.clone()
    # If the offset is uncertain too, many codes would fit any values.
    levels = _LEVELS if precision == torch.float32 else _UNCERTAIN
    open_ = torch.ones_like(low, dtype=torch.bool)
    for shift in _NEIGHBOURS if precision == torch.bfloat16 else (0,):
        (rows,) = open_.nonzero(as_tuple=True)
        trial = low[rows] + shift * spacing[rows]
        found, step, fits = _fitted(groups[rows], groups[rows], trial, precision, levels)
        if not bool(fits.any()):
            continue
        codes[rows[fits]], steps[rows[fits]], offsets[rows[fits]] = found[fits], step[fits], trial[fits]
        open_[rows[fits]] = False
    if bool(open_.any()):
        return None
    for shift in range(1, _ABSENT + 1):
        # A long mantissa means that this is not the offset: code 0 is missing in this group, some steps below.
        (rows,) = ((offsets.view(torch.int32) & _LONG) != 0).nonzero(as_tuple=True)
        below = offsets[rows] - shift * steps[rows]
        below = ((below.view(torch.int32) + (_LONG + 1) // 2) & ~_LONG).view(torch.float32)
        again = _dequantized(codes[rows] + shift, steps[rows, None], below[:, None], precision)
        fits = (again == groups[rows]).all(1)
        codes[rows[fits]], offsets[rows[fits]] = codes[rows[fits]] + shift, below[fits]
    return Lattice(codes.to(torch.int16), steps, offsets)


def _fitted(
    values: Tensor, points: Tensor, offset: Tensor, precision: torch.dtype, levels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Non-negative codes (groups, width) and steps (groups,) that give ``values``, and a mask of groups where they do.

    ``points`` (groups, any) are those whose differences are multiples of the step.
    """
    if precision != torch.float32:
        return _bounded(values, points, offset, precision, levels)
    # Most grids have float16 steps, and most groups have adjacent codes: these are found without bounds.
    distance, gaps = values - offset[:, None], points.sort(1).values.diff(dim=1)
    span = distance.amax(1)
    gap = torch.where(gaps > _NOISE * values.abs().amax(1, keepdim=True), gaps, torch.inf).amin(1)
    steps = (span / (span / gap).round()).half().float()
    codes = (distance / steps[:, None]).round().nan_to_num_(0.0, 0.0, 0.0)
    fits = (steps > 0) & (codes.amax(1) < levels)
    fits &= (_dequantized(codes, steps[:, None], offset[:, None], precision) == values).all(1)
    (rows,) = (~fits).nonzero(as_tuple=True)
    if len(rows):
        codes[rows], steps[rows], fits[rows] = _bounded(values[rows], points[rows], offset[rows], precision, levels)
    return codes, steps, fits


def _bounded(
    values: Tensor, points: Tensor, offset: Tensor, precision: torch.dtype, levels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Like :func:`_fitted`, but from the bounds of every value on its step."""
    distance = values.double() - offset[:, None].double()
    half = torch.ldexp(torch.ones_like(distance), torch.frexp(values)[1] - _PRECISION[precision] - 1)
    gaps, span = points.double().sort(1).values.diff(dim=1), distance.amax(1)
    gap = torch.where(gaps > 4 * half.amax(1, keepdim=True), gaps, torch.inf).amin(1)
    codes, steps, open_ = torch.zeros_like(values), torch.zeros_like(offset), span > 0
    # The span is many steps long, so it determines the step more precisely than one difference.
    exact = precision == torch.float32
    guesses = [span / gap * multiple for multiple in range(1, _MULTIPLES + 1)]
    for guess in guesses if exact else [torch.full_like(span, most) for most in _LARGEST] + guesses:
        count = guess.round()
        (rows,) = (open_ & (count >= 1) & (count < levels)).nonzero(as_tuple=True)
        if not len(rows):
            continue
        trial = (distance[rows] / (span[rows] / count[rows])[:, None]).round()
        for _ in range(0 if exact else _REFINEMENTS):
            # All values together determine it better than the rounded largest value.
            mean = (distance[rows] * trial).sum(1) / trial.square().sum(1)
            trial = (distance[rows] / mean[:, None]).round()
        for step in _steps(distance[rows], half[rows], trial):
            again = _dequantized(trial.float(), step[:, None], offset[rows, None], precision)
            hit = (again == values[rows]).all(1) & open_[rows]
            codes[rows[hit]], steps[rows[hit]], open_[rows[hit]] = trial[hit].float(), step[hit], False
            if not bool(open_[rows].any()):
                break
    # A group of one distinct value is only an offset.
    return codes, steps, ~open_ & (_dequantized(codes, steps[:, None], offset[:, None], precision) == values).all(1)


def _steps(distance: Tensor, half: Tensor, codes: Tensor) -> Iterator[Tensor]:
    """Steps (groups,) float32 that all values of a group allow, short mantissas first."""
    met = codes > 0
    low = torch.where(met, (distance - half) / codes, 0.0).amax(1)
    high = torch.where(met, (distance + half) / codes, torch.inf).amin(1)
    middle, exponent = torch.frexp((low + high) / 2)
    for bits, neighbours in _MANTISSAS:
        for shift in sorted(range(-neighbours, neighbours + 1), key=abs):
            step = torch.ldexp((middle * 2**bits).round() + shift, exponent - bits)
            if bool(((low <= step) & (step <= high)).any()):
                yield step.float()


def _dequantized(codes: Tensor, step: Tensor, offset: Tensor | None, precision: torch.dtype) -> Tensor:
    """In float32, product and sum rounded one after the other, then to ``precision``."""
    values = codes * step
    return (values if offset is None else values + offset).to(precision).float()
