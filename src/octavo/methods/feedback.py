"""Error feedback over the columns of a matrix: the loop that GPTQ, SparseGPT and entropy-constrained rounding share.

For ``loss = tr(E C E^T)`` there are ``d > 0`` and a unit upper triangular ``V`` (in the
order of processing, from the Cholesky factor of the reversed ``C``) with

    loss = sum_j d[j] * |F[:, j]|^2,     F = E V

``F[:, j]`` is what column ``j`` misses of its target, which is its weight plus what the errors of the columns before
it ask for: ``target[:, j] = W[:, j] - sum_{k before j} F[:, k] * inverse(V)[k, j]``. Rounding the target to its
nearest value minimises the term of column ``j``. This is GPTQ's update (Frantar et al., 2022, arXiv 2210.17323)
written without inverting ``C``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from octavo.calibrate import Evidence

#: Columns whose feedback is applied one by one before it is applied to the rest by one matrix product.
_BLOCK = 64


def factor(columns: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """``d`` (columns,) and ``-inverse(V)`` (columns, columns), float32, for columns processed in ``order``.

    ``columns`` must be positive definite (evidence is damped, so it is).
    """
    backwards = order.flip(0)
    lower = torch.linalg.cholesky(columns.double()[backwards][:, backwards]).flip(0, 1)
    diagonal = lower.diagonal().clone()
    unit = torch.eye(len(lower), dtype=lower.dtype)
    inverse = torch.linalg.solve_triangular(lower / diagonal, unit, upper=True, unitriangular=True)
    return diagonal.square().float(), -inverse.float()


def important_first(columns: Tensor) -> Tensor:
    """Columns by falling second moment (GPTQ's activation order)."""
    return columns.diagonal().argsort(descending=True, stable=True)


def factored(evidence: Evidence, *, ordered: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Order of processing and the two results of :func:`factor`, worked out once for all settings of a site."""
    key = f"factored {ordered}"
    if key not in evidence.cache:
        columns = evidence.columns
        if columns is None:
            raise ValueError("evidence without a moment has nothing to factor")
        order = important_first(columns) if ordered else torch.arange(len(columns))
        evidence.cache[key] = (order, *factor(columns, order))
    return evidence.cache[key]


def round_columns(targets: Tensor, feedback: Tensor, quantize: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Round columns one after another, feeding errors forward.

    Parameters
    ----------
    targets
        (columns, rows): the *transposed* weights, so that a column is contiguous. Overwritten with ``F``.
    feedback
        Second result of :func:`factor`, (columns, columns).
    quantize
        Called with a column's position and its (rows,) target; returns the rounded values.

    Returns
    -------
    Tensor
        The rounded values, (columns, rows).
    """
    columns = len(targets)
    rounded = torch.empty_like(targets)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors = targets[start:stop]
        for j in range(start, stop):
            target = targets[j]
            if j > start:
                target = torch.addmv(target, errors[: j - start].t(), feedback[start:j, j])
            values = quantize(j, target)
            rounded[j] = values
            torch.sub(target, values, out=errors[j - start])
        if stop < columns:
            targets[stop:].addmm_(feedback[start:stop, stop:].t(), errors)
    return rounded
