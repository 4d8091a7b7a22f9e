"""Steps and offsets of ggml's blocks, searched against the second moments of the inputs.

A group of weights ``x`` is ``step * level[code] + offset``. For given codes the best step and offset are those of
weighted least squares, with the diagonal of the second moment as weights. Codes come from a few starting steps, and the
best of these is kept. Then the steps of a block are rounded to ``d * scale``, and ``d`` is fitted again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from octavo.coding.ggml import BlockType, Fields

#: Starting steps, as shares of that at which the extremes are the outermost levels.
_SHARES = (0.7, 0.78, 0.84, 0.89, 0.93, 0.97, 1.0, 1.04)
#: The shares for types of 8 and 6 bits, where clipping never pays much.
_FINE = (0.97, 1.0)
#: Rounds that begin with the best step and offset found so far.
_AGAIN = (None, None, None)
#: Weights fitted at once, so that what is needed for them stays in the cache.
_AT_ONCE = 1 << 18
_LARGEST, _TINY = 65504.0, 1e-30

BlockParts = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def fitted(weight: Tensor, kind: BlockType, importance: Tensor | None) -> Fields:
    """Fields of a type without codes.

    Parameters
    ----------
    weight
        (rows, columns) float32.
    importance
        (columns,) second moments of the inputs; None if all are alike.
    """
    rows, columns = weight.shape
    weights = torch.ones(columns) if importance is None else importance / importance.mean().clamp_min(_TINY)
    # Columns without input still get the nearest values.
    weights = weights.clamp_min(1e-4).view(-1, kind.group)
    found = list(_chunks(weight.view(rows, -1, kind.group), weights, kind))
    d, base, scales, minima = (None if part[0] is None else torch.cat(part) for part in zip(*found, strict=True))
    assert d is not None
    return Fields(torch.empty(0, dtype=torch.uint8), d, base, scales, minima)


def _chunks(groups: Tensor, weights: Tensor, kind: BlockType) -> Iterator[BlockParts]:
    height = max(1, _AT_ONCE // (groups.shape[1] * groups.shape[2]))
    for part in groups.split(height):
        step, offset = (_affine if kind.offset else _scaled)(part, weights, kind)
        yield _small(step, offset) if kind.scales is None else _two_level(part, weights, kind, step, offset)


def stored(step: Tensor, offset: Tensor | None, kind: BlockType) -> BlockParts:
    """``d``, ``base``, ``scales`` and ``minima`` nearest to steps and offsets (rows, groups)."""
    if kind.scales is None:
        return _small(step, offset)
    share = kind.block // kind.group
    d, scales = _rounded(step if kind.scales[0] < 0 else step.clamp_min(0), share, kind.scales)
    if offset is None:
        return d, None, scales.short(), None
    assert kind.minima is not None
    base, minima = _rounded((-offset).clamp_min(0), share, kind.minima)
    return d, base, scales.short(), minima.short()


def nearest(values: Tensor, step: Tensor, offset: Tensor | None, levels: Tensor) -> Tensor:
    """Numbers of the nearest levels, as the dtype of ``values``; step and offset are broadcast.

    Levels are rising; a step of zero gives any of them.
    """
    scaled = values if offset is None else values - offset
    scaled = torch.where(step == 0, 0.0, scaled / step)
    low, high = float(levels[0]), float(levels[-1])
    if high - low == len(levels) - 1:
        return scaled.round_().clamp_(low, high).sub_(low)
    # Levels are whole, so which is nearest changes only at multiples of a half.
    halves = scaled.mul_(2).floor_().clamp_(2 * low, 2 * high).sub_(2 * low).int()
    return _table(levels)[halves]


def _table(levels: Tensor) -> Tensor:
    """The number of the nearest level for every half between the outermost levels."""
    places = torch.arange(float(levels[0]), float(levels[-1]) + 0.5, 0.5)
    return torch.bucketize(places, (levels[1:] + levels[:-1]) / 2, right=True).float()


def _scaled(x: Tensor, weights: Tensor, kind: BlockType) -> tuple[Tensor, None]:
    """Steps (rows, groups) of either sign: the largest weight is at the outermost level, or a little beyond."""
    levels = torch.tensor(kind.levels, dtype=torch.float32)
    extreme = x.gather(2, x.abs().argmax(2, keepdim=True))
    starts = [extreme / (levels[0] * share) for share in (_FINE if kind.bits > 6 else _SHARES)]
    # The other outermost level is where llama.cpp puts the largest weight of 8 bits: blocks decoded before match it.
    if kind.levels[-1] + kind.levels[0] != 0 and (kind.bits < 6 or kind.bits > 8):
        starts += [extreme / (levels[-1] * share) for share in ((0.9, 1.0) if kind.bits < 6 else (1.0,))]
    best, most = torch.zeros_like(extreme[..., 0]), torch.full_like(extreme[..., 0], -1.0)
    weighted = x * weights
    for start in starts:
        codes = levels[nearest(x, start, None, levels).long()]
        along, norm = (weighted * codes).sum(2), (codes.square_() * weights).sum(2).clamp_min_(_TINY)
        explained = along.square() / norm
        better = explained > most
        best, most = torch.where(better, along / norm, best), torch.where(better, explained, most)
    return best, None


def _affine(x: Tensor, weights: Tensor, kind: BlockType) -> tuple[Tensor, Tensor]:
    """Steps, not negative, and offsets (rows, groups); those of the K types are not positive."""
    top, low = x.amax(2), x.amin(2)
    if kind.minima is not None:
        top, low = top.clamp_min(0), low.clamp_max(0)
    levels = torch.tensor(kind.levels, dtype=torch.float32)
    total, first = weights.sum(1), (weights * x).sum(2)
    best_step, best_offset = (top - low) / levels[-1], low
    least = torch.full_like(low, torch.inf)
    middle, half = (top + low) / 2, (top - low) / 2
    for share in (*_SHARES, *_AGAIN):
        start, begin = best_step, best_offset
        if share:
            start, begin = 2 * share * half / levels[-1], middle - share * half
        if kind.minima is not None:
            begin = begin.clamp_max(0)
        start = start.clamp_min(_TINY)
        codes = nearest(x, start[..., None], begin[..., None], levels)
        heavy = codes * weights
        one, two, cross = heavy.sum(2), (heavy * codes).sum(2), (heavy * x).sum(2)
        determinant = (total * two - one.square()).clamp_min(_TINY)
        step = (total * cross - one * first) / determinant
        offset = (first - step * one) / total
        if kind.minima is not None:
            alone = offset > 0
            offset = offset.clamp_max(0)
            step = torch.where(alone, cross / two.clamp_min(_TINY), step)
        step = step.clamp_min(0)
        # Up to the squares of the weights, which are the same for all.
        error = step.square() * two + offset.square() * total
        error = error + 2 * (step * offset * one - step * cross - offset * first)
        better = error < least
        best_step, best_offset = torch.where(better, step, best_step), torch.where(better, offset, best_offset)
        least = torch.where(better, error, least)
    return best_step, best_offset


def _half(values: Tensor) -> Tensor:
    return values.clamp(-_LARGEST, _LARGEST).half()


def _small(step: Tensor, offset: Tensor | None) -> BlockParts:
    return _half(step), None if offset is None else _half(offset), None, None


def _two_level(x: Tensor, weights: Tensor, kind: BlockType, step: Tensor, offset: Tensor | None) -> BlockParts:
    """Blocks' float16 values and groups' integers whose products are nearest to steps and offsets."""
    assert kind.scales is not None
    share = kind.block // kind.group
    d, scales = _rounded(step, share, kind.scales)
    if offset is None:
        return _refitted(x, weights, kind, d, scales), None, scales.short(), None
    assert kind.minima is not None
    levels = torch.tensor(kind.levels, dtype=torch.float32)
    # With the steps as they will be stored, offsets are fitted again.
    step = d.float().repeat_interleave(share, 1) * scales
    codes = nearest(x, step[..., None], offset[..., None], levels)
    offset = (((x - step[..., None] * codes) * weights).sum(2) / weights.sum(1)).clamp_max(0)
    base, minima = _rounded(-offset, share, kind.minima)
    return d, base, scales.short(), minima.short()


def _rounded(values: Tensor, share: int, bounds: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """``d`` (rows, blocks) float16 and integers (rows, groups), as floats, whose products are nearest to values."""
    blocks = values.unflatten(1, (-1, share))
    if bounds[0] < 0:
        extreme = blocks.gather(2, blocks.abs().argmax(2, keepdim=True))[..., 0] / bounds[0]
    else:
        extreme = blocks.amax(2) / bounds[1]
    d = _half(extreme)
    wide = d.float()[..., None]
    return d, torch.where(wide == 0, 0.0, (blocks / wide).round().clamp(*bounds)).flatten(1)


def _refitted(x: Tensor, weights: Tensor, kind: BlockType, d: Tensor, scales: Tensor) -> Tensor:
    """``d`` by least squares over its block, for these integers and the codes that they give."""
    share = kind.block // kind.group
    levels = torch.tensor(kind.levels, dtype=torch.float32)
    step = d.float().repeat_interleave(share, 1) * scales
    values = levels[nearest(x, step[..., None], None, levels).long()] * scales[..., None]
    along, norm = (values * x * weights).sum(2), (values.square() * weights).sum(2)
    along, norm = (part.unflatten(1, (-1, share)).sum(2) for part in (along, norm))
    return torch.where(norm > 0, _half(along / norm.clamp_min(_TINY)), d)
