"""How the scales and offsets of groups are stored: as the values they were computed from, where that is smaller.

Quantizers fit a group's grid to its extremes and round the step to float16, ``step = float16((top - low) / levels)``.
The extremes are weights of the original model. In bfloat16 they hold 8 bits each while the step holds 11, so the
extreme is stored and the step recomputed (``reach``). Two-level quantizers give each block of groups one float16, and
each group a small integer that multiplies it (``product``). Anything else is stored unchanged (``plain``). All three
restore the same bits, because they only use IEEE operations, which are rounded correctly everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from octavo.forms import floats
from octavo.forms.base import expect, expect_integers

#: Numbers of groups that may share one factor, as in GGUF's K-quants: blocks of 256 with groups of 16 or 32 columns.
_BLOCKS = (16, 8)
#: Largest integer that multiplies a shared factor: 7 bits, and a margin for groups whose codes are all even or
#: multiples of three.
_RATIO = 384
#: Mantissa bits that bfloat16 does not have.
_BFLOAT16 = 16


def store(values: Tensor, levels: int, low: Tensor | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Parts and numbers from which :func:`load` restores ``values``.

    Parameters
    ----------
    values
        (rows, groups) float32.
    levels
        Largest magnitude of the codes that these steps multiply.
    low
        The value of code 0, (rows, groups); None for zero.
    """
    reach = _reach(values, levels, low)
    if reach is not None:
        parts, meta = floats.split(reach)
        return parts, {"kind": "reach", "levels": levels, **meta}
    product = None if _is_half(values) else _product(values)
    if product is not None:
        shared, ratio = product
        parts, meta = floats.split(shared)
        return {**parts, "ratio": ratio}, {"kind": "product", "block": ratio.shape[1] // shared.shape[1], **meta}
    parts, meta = floats.split(values)
    return parts, {"kind": "plain", **meta}


def load(
    parts: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int], low: Tensor | None = None
) -> Tensor:
    """Exact inverse of :func:`store`; everything is checked."""
    kind = meta["kind"]
    if kind == "plain":
        return floats.join(parts, meta, shape)
    if kind == "reach":
        levels = meta["levels"]
        expect(type(levels) is int and 0 < levels < 1 << 24, f"{levels!r} is not a valid number of levels")
        return _finite(_steps(floats.join(parts, meta, shape), levels, low))
    expect(kind == "product", f"steps are stored as {kind!r}; this version knows plain, reach and product")
    block = meta["block"]
    expect(
        type(block) is int and block > 0 and shape[1] % block == 0,
        f"{shape[1]} groups cannot be divided into blocks of {block!r}",
    )
    shared = floats.join(parts, meta, (shape[0], shape[1] // block))
    ratio = expect_integers(parts["ratio"], shape, "ratio")
    return _finite(shared.repeat_interleave(block, 1) * ratio.float())


def _finite(steps: Tensor) -> Tensor:
    """Computed steps, which may overflow although what they are computed from is finite."""
    expect(bool(torch.isfinite(steps).all()), "steps computed from a file are not finite, so Octavo did not write them")
    return steps


def _steps(reach: Tensor, levels: int, low: Tensor | None) -> Tensor:
    return ((reach if low is None else reach - low) / levels).half().float()


def _reach(steps: Tensor, levels: int, low: Tensor | None) -> Tensor | None:
    """bfloat16 extremes that reproduce all of these steps, or None."""
    if levels == 0 or not _is_half(steps):
        return None
    estimate = steps * levels if low is None else steps * levels + low
    nearest = estimate.bfloat16().float()
    found, open_ = nearest, _steps(nearest, levels, low) != steps
    for neighbour in (-1, 1):
        other = (nearest.view(torch.int32) + (neighbour << _BFLOAT16)).view(torch.float32)
        hit = open_ & (_steps(other, levels, low) == steps)
        found, open_ = torch.where(hit, other, found), open_ & ~hit
    return None if bool(open_.any()) else found


def _is_half(values: Tensor) -> bool:
    return torch.equal(values.half().float(), values)


def _product(values: Tensor) -> tuple[Tensor, Tensor] | None:
    """Shared float16 factors (rows, blocks) and integers (rows, groups) whose products are these values, or None."""
    for block in _BLOCKS:
        if values.shape[1] % block:
            continue
        split = values.reshape(-1, block)
        largest = split.gather(1, split.abs().argmax(1, keepdim=True))
        shared = torch.zeros_like(largest)
        (rows,) = (largest[:, 0] != 0).nonzero(as_tuple=True)
        for ratio in range(1, _RATIO + 1):
            factor = (largest[rows] / ratio).half().float()
            fits = (factor * (split[rows] / factor).round() == split[rows]).all(1)
            shared[rows[fits]], rows = factor[fits], rows[~fits]
            if not len(rows):
                integers = (split / torch.where(shared == 0, 1.0, shared)).round()
                return shared.reshape(len(values), -1), integers.to(torch.int16).reshape(values.shape)
    return None
