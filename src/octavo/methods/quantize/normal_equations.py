"""The best steps and offsets of groups for codes that are known: least squares under the whole second moment.

A row is ``w ~ sum_g step[g] a[g] + offset[g] 1[g]``, where ``a[g]`` are the levels of the codes of group ``g`` and zero
elsewhere. The loss ``(w - what) C (w - what)`` is quadratic in steps and offsets, so their best values solve a small
linear system for every row.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Added to the diagonal, as a share of its mean.
_RIDGE = 1e-6


def normal_equations(weight: Tensor, moment: Tensor, levels: Tensor, *, offsets: bool = False) -> tuple[Tensor, Tensor]:
    """The matrix (rows, n, n) and right side (rows, n) of every row: n are the steps, then the offsets if wanted.

    Parameters
    ----------
    weight
        (rows, columns) float32.
    moment
        (columns, columns) second moment of the inputs.
    levels
        What the codes stand for, (rows, groups, columns of a group).
    """
    width = levels.shape[2]
    by_group = moment.unflatten(0, (-1, width))
    seen = torch.einsum("ngw,gwc->ngc", levels, by_group)
    steps = (seen.unflatten(2, (-1, width)) * levels[:, None]).sum(3)
    right = (seen * weight[:, None]).sum(2)
    if not offsets:
        return steps, right
    ones = by_group.sum(1)
    across = seen.unflatten(2, (-1, width)).sum(3)
    both = ones.unflatten(1, (-1, width)).sum(2).expand(len(weight), -1, -1)
    matrix = torch.cat([torch.cat([steps, across], 2), torch.cat([across.mT, both], 2)], 1)
    return matrix, torch.cat([right, weight @ ones.t()], 1)


def solved(matrix: Tensor, right: Tensor) -> Tensor:
    """Steps and offsets (rows, n) float32; those of groups whose levels are all zero are zero."""
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    ridge = _RIDGE * diagonal.mean(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    system = matrix + torch.diag_embed(ridge + (diagonal <= 0).float())
    return torch.linalg.solve(system.double(), right.double()).float()
