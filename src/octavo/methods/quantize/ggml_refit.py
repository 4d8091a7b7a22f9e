"""Steps and offsets of ggml's blocks, fitted again once codes are known.

The best values (:mod:`octavo.methods.quantize.normal_equations`) are rounded as they are stored. A row keeps its old
ones where the rounded ones are not better.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from octavo.coding.ggml import BlockType, Fields
from octavo.methods.quantize.ggml_steps import BlockParts, stored
from octavo.methods.quantize.normal_equations import normal_equations, solved

#: Elements of the largest intermediate.
_AT_ONCE = 1 << 20


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


def _chunks(weight: Tensor, moment: Tensor, kind: BlockType, fields: Fields, height: int) -> Iterator[BlockParts]:
    levels = torch.tensor(kind.levels, dtype=torch.float32)
    for start in range(0, len(weight), height):
        part = slice(start, start + height)
        values = (None if value is None else value[part] for value in vars(fields).values())
        old = Fields(*values)  # type: ignore[arg-type]
        spread = levels[old.codes.int()].unflatten(1, (-1, kind.group))
        matrix, right = normal_equations(weight[part], moment, spread, offsets=kind.offset)
        found = solved(matrix, right)
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


def _loss(matrix: Tensor, right: Tensor, kind: BlockType, fields: Fields) -> Tensor:
    """Loss of every row, up to a constant."""
    step, offset = kind.affine(fields)
    values = step if offset is None else torch.cat([step, offset], 1)
    return (torch.einsum("nij,nj->ni", matrix, values) * values).sum(1) - 2 * (values * right).sum(1)
