"""Steps and offsets of ggml's blocks, fitted again once codes are known: least squares under the whole second moment.

For fixed codes a row is ``w ~ sum_g step[g] a[g] + offset[g] 1[g]``, where ``a[g]`` are the levels of the codes of
group ``g`` and zero elsewhere. The loss ``(w - what) C (w - what)`` is quadratic in steps and offsets, so their best
values solve a small linear system for every row; a few steps of conjugate gradients come near enough. They are rounded
as they are stored, and a row keeps its old ones where the rounded ones are not better.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from octavo.coding.ggml import BlockType, Fields
from octavo.methods.quantize.ggml_steps import stored

#: Elements of the largest intermediate.
_AT_ONCE = 1 << 20
#: Steps of conjugate gradients.
_STEPS = 12
#: Added to the diagonal, as a share of its mean: groups of zero codes have no step.
_RIDGE, _TINY = 1e-6, 1e-30


def refitted(weight: Tensor, moment: Tensor, kind: BlockType, fields: Fields) -> Fields:
    """Fields with the same codes, and steps and offsets of no greater loss.

    Parameters
    ----------
    weight
        (rows, columns) float32.
    moment
        (columns, columns) second moment of the inputs.
    """
    groups = weight.shape[1] // kind.group
    height = max(1, _AT_ONCE // (groups * weight.shape[1]))
    parts = list(_chunks(weight, moment, kind, fields, height))
    heads = (None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True))
    d, base, scales, minima = heads
    assert d is not None
    return Fields(fields.codes, d, base, scales, minima)


Heads = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def _chunks(weight: Tensor, moment: Tensor, kind: BlockType, fields: Fields, height: int) -> Iterator[Heads]:
    levels = torch.tensor(kind.levels, dtype=torch.float32)
    for start in range(0, len(weight), height):
        part = slice(start, start + height)
        values = (None if value is None else value[part] for value in vars(fields).values())
        old = Fields(*values)  # type: ignore[arg-type]
        matrix, right = _system(weight[part], moment, levels[old.codes.int()].unflatten(1, (-1, kind.group)), kind)
        found = _descended(matrix, right, _values(kind, old))
        groups = weight.shape[1] // kind.group
        step, offset = found[:, :groups], found[:, groups:] if kind.offset else None
        new = Fields(old.codes, *stored(step, offset, kind))
        better = (_loss(matrix, right, kind, new) < _loss(matrix, right, kind, old))[:, None]
        yield (
            torch.where(better, new.d, old.d),
            _either(better, new.base, old.base),
            _either(better, new.scales, old.scales),
            _either(better, new.minima, old.minima),
        )


def _either(better: Tensor, new: Tensor | None, old: Tensor | None) -> Tensor | None:
    return None if new is None or old is None else torch.where(better, new, old)


def _system(weight: Tensor, moment: Tensor, levels: Tensor, kind: BlockType) -> tuple[Tensor, Tensor]:
    """The matrix (rows, n, n) and right side (rows, n) of every row: steps first, then offsets."""
    width = kind.group
    by_group = moment.unflatten(0, (-1, width))
    seen = torch.einsum("ngw,gwc->ngc", levels, by_group)
    steps = (seen.unflatten(2, (-1, width)) * levels[:, None]).sum(3)
    right = (seen * weight[:, None]).sum(2)
    if not kind.offset:
        return steps, right
    ones = by_group.sum(1)
    across = seen.unflatten(2, (-1, width)).sum(3)
    both = ones.unflatten(1, (-1, width)).sum(2).expand(len(weight), -1, -1)
    matrix = torch.cat([torch.cat([steps, across], 2), torch.cat([across.mT, both], 2)], 1)
    return matrix, torch.cat([right, weight @ ones.t()], 1)


def _values(kind: BlockType, fields: Fields) -> Tensor:
    """Steps and offsets (rows, n)."""
    step, offset = kind.affine(fields)
    return step if offset is None else torch.cat([step, offset], 1)


def _descended(matrix: Tensor, right: Tensor, start: Tensor) -> Tensor:
    """Nearly the solution of every row's system, by preconditioned conjugate gradients."""
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    ridge = (_RIDGE * diagonal.mean(1, keepdim=True)).clamp_min(_TINY)
    inverse = 1 / (diagonal + ridge)

    def applied(values: Tensor) -> Tensor:
        return torch.bmm(matrix, values[:, :, None])[:, :, 0] + ridge * values

    found, rest = start.clone(), right - applied(start)
    ahead = inverse * rest
    along, gain = ahead, (rest * ahead).sum(1, keepdim=True)
    for _ in range(_STEPS):
        pushed = applied(along)
        size = gain / (along * pushed).sum(1, keepdim=True).clamp_min(_TINY)
        found, rest = found + size * along, rest - size * pushed
        ahead = inverse * rest
        before, gain = gain, (rest * ahead).sum(1, keepdim=True)
        along = ahead + gain / before.clamp_min(_TINY) * along
    return found


def _loss(matrix: Tensor, right: Tensor, kind: BlockType, fields: Fields) -> Tensor:
    """Loss of every row, up to a constant."""
    values = _values(kind, fields)
    return (torch.einsum("nij,nj->ni", matrix, values) * values).sum(1) - 2 * (values * right).sum(1)
