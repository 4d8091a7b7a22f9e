"""Codes improved one at a time, and scales fitted to codes: descent on the cost of a matrix's error.

Both lower ``tr(E C E^T)`` for ``E = W - Q``, row by row, where ``C`` is the second moment of the inputs. Rounding with
error feedback never returns to a column. Coordinate descent does (QuantEase; Behdin et al., 2023, arXiv 2309.01885).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from octavo.methods.compiled import compiled
from octavo.methods.quantize.normal_equations import normal_equations, solved

#: Passes over all columns; rows that no longer change stop earlier.
_SWEEPS = 8


def descended(weight: Tensor, codes: Tensor, scale: Tensor, moment: Tensor, low: int, high: int) -> Tensor:
    """Codes of which no single one can be changed with gain, unless :data:`_SWEEPS` end first.

    Parameters
    ----------
    weight, codes
        (rows, columns) float32.
    scale
        (rows, groups) float32; groups divide the columns, and no scale is zero.
    moment
        (columns, columns) float32, positive definite.
    low, high
        Smallest and largest code.
    """
    spread = scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)
    residual, codes = (weight - codes * spread) @ moment, codes.clone()
    quick = compiled(_descend) if weight.device.type == "cpu" else None
    if quick is not None:
        quick(residual.numpy(), codes.numpy(), spread.contiguous().numpy(), moment.contiguous().numpy(), low, high)
        return codes
    for _ in range(_SWEEPS):
        before = codes.clone()
        for j in range(weight.shape[1]):
            step = spread[:, j]
            new = (codes[:, j] + residual[:, j] / (moment[j, j] * step)).round_().clamp_(low, high)
            residual.addr_((new - codes[:, j]) * step, moment[j], alpha=-1)
            codes[:, j] = new
        if torch.equal(before, codes):
            break
    return codes


def _descend(
    residual: np.ndarray, codes: np.ndarray, spread: np.ndarray, moment: np.ndarray, low: int, high: int
) -> None:
    """Descent of all rows, for numba; most codes do not change, so updates are few."""
    rows, columns = codes.shape
    for i in range(rows):
        for _ in range(_SWEEPS):
            changed = False
            for j in range(columns):
                old, step = codes[i, j], spread[i, j]
                new = min(max(np.rint(old + residual[i, j] / (moment[j, j] * step)), low), high)
                if new != old:
                    change = (new - old) * step
                    for k in range(columns):
                        residual[i, k] -= change * moment[j, k]
                    codes[i, j] = new
                    changed = True
            if not changed:
                break


def fitted_scales(weight: Tensor, codes: Tensor, scale: Tensor, moment: Tensor) -> Tensor:
    """The scales of least cost for given codes, (rows, groups) float32: one linear system for each row.

    Groups whose codes are all zero keep their scale. Parameters are those of :func:`descended`.
    """
    matrix, right = normal_equations(weight, moment, codes.unflatten(1, (scale.shape[1], -1)))
    found = solved(matrix, right)
    empty = matrix.diagonal(dim1=1, dim2=2) <= 0
    return torch.where(empty | ~found.isfinite() | (found == 0), scale, found)
