"""Codes improved one at a time, and scales fitted to codes: descent on the cost of a matrix's error.

Both lower ``tr(E C E^T)`` for ``E = W - Q``, row by row, where ``C`` is the second moment of the inputs. Rounding with
error feedback never returns to a column. Coordinate descent does (QuantEase; Behdin et al., 2023, arXiv 2309.01885).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from octavo.methods.quantize.normal_equations import normal_equations, solved
from octavo.system.compiled import compiled

#: Passes over all columns; rows that no longer change stop earlier.
_SWEEPS = 8


def descended(
    weight: Tensor, codes: Tensor, step: Tensor, offset: Tensor | None, levels: Tensor, moment: Tensor
) -> Tensor:
    """Codes of which no single one can be changed with gain, unless :data:`_SWEEPS` end first.

    Parameters
    ----------
    weight
        (rows, columns) float32.
    codes
        (rows, columns) int32, numbers of levels.
    step, offset
        (rows, groups) float32; a weight is ``step * levels[code] + offset``. Groups divide the columns. Where a step is
        zero codes stay.
    levels
        Whole numbers, rising, float32.
    moment
        (columns, columns) float32, not negative definite.
    """
    group = weight.shape[1] // step.shape[1]
    steps = step.repeat_interleave(group, 1)
    low = 0.0 if offset is None else offset.repeat_interleave(group, 1)
    values, codes = levels[codes] * steps + low, codes.clone()
    residual, middles = (weight - values) @ moment, (levels[1:] + levels[:-1]) / 2
    quick = compiled(_descend) if weight.device.type == "cpu" else None
    if quick is not None:
        tables = (tensor.contiguous().numpy() for tensor in (step, levels, middles, moment))
        quick(residual.numpy(), codes.numpy(), *tables, group)
        return codes
    for _ in range(_SWEEPS):
        before = codes.clone()
        for j in range(weight.shape[1]):
            scale = moment[j, j] * steps[:, j]
            old = levels[codes[:, j]]
            wanted = torch.bucketize(old + residual[:, j] / scale, middles).int()
            new = torch.where(scale == 0, codes[:, j], wanted)
            residual.addr_((levels[new] - old) * steps[:, j], moment[j], alpha=-1)
            codes[:, j] = new
        if torch.equal(before, codes):
            break
    return codes


def _descend(
    residual: np.ndarray,
    codes: np.ndarray,
    steps: np.ndarray,
    levels: np.ndarray,
    middles: np.ndarray,
    moment: np.ndarray,
    group: int,
) -> None:
    """Descent of all rows, for numba; most codes do not change, so updates are few."""
    rows, columns = codes.shape
    last = len(levels) - 1
    even = levels[last] - levels[0] == last
    for i in range(rows):
        for _ in range(_SWEEPS):
            changed = False
            for j in range(columns):
                step = steps[i, j // group]
                if step * moment[j, j] == 0:
                    continue
                old = codes[i, j]
                wanted = levels[old] + residual[i, j] / (moment[j, j] * step)
                if even:
                    new = int(min(max(np.rint(wanted), levels[0]), levels[last]) - levels[0])
                else:
                    new = 0
                    while new < last and wanted > middles[new]:
                        new += 1
                if new != old:
                    change = (levels[new] - levels[old]) * step
                    for k in range(columns):
                        residual[i, k] -= change * moment[j, k]
                    codes[i, j] = new
                    changed = True
            if not changed:
                break


def fitted_scales(weight: Tensor, codes: Tensor, scale: Tensor, moment: Tensor) -> Tensor:
    """The scales of least cost for given codes, (rows, groups) float32: one linear system for each row.

    Groups whose codes are all zero keep their scale. Codes are what scales are multiplied with, as float32; other
    parameters are those of :func:`descended`.
    """
    matrix, right = normal_equations(weight, moment, codes.unflatten(1, (scale.shape[1], -1)))
    found = solved(matrix, right)
    empty = matrix.diagonal(dim1=1, dim2=2) <= 0
    return torch.where(empty | ~found.isfinite() | (found == 0), scale, found)
