"""Error feedback over the columns of a matrix: the loop shared by GPTQ, SparseGPT and entropy-constrained rounding.

For ``loss = tr(E C E^T)`` there are ``d > 0`` and a unit upper triangular ``V`` (in the
order of processing, from the Cholesky factor of the reversed ``C``) with

    loss = sum_j d[j] * |F[:, j]|^2,     F = E V

``F[:, j]`` is the deviation of column ``j`` from its target, which is its weight plus the feedback of the preceding
columns: ``target[:, j] = W[:, j] - sum_{k before j} F[:, k] * inverse(V)[k, j]``. Rounding the target to the nearest
value minimises the term of column ``j``. This is GPTQ's update (Frantar et al., 2022, arXiv 2210.17323) written without
inverting ``C``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from octavo.calibration.evidence import Evidence, require_finite

Sweep = Callable[[int, Tensor, Tensor, Tensor], None]
#: Weights of a chunk of rows, which fits the cache. Its columns are too short to be split over threads, whose
#: synchronisation at every column would cost more than the work.
_CHUNK = 1 << 19
#: Columns whose feedback is applied one by one; then one matrix product applies it to the remaining columns.
_BLOCK = 64
#: Rows of a triangular matrix that are solved rather than halved.
_SOLVED = 192


def factor(columns: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """``d`` (columns,) and ``-inverse(V)`` (columns, columns), float32, for columns processed in ``order``.

    ``columns`` must be positive definite (evidence is damped, so it is).
    """
    require_finite(columns)
    backwards = order.flip(0)
    lower = torch.linalg.cholesky(columns[backwards[:, None], backwards].double())
    diagonal = lower.diagonal().clone()
    inverse = _inverse(lower.div_(diagonal))
    return diagonal.flip(0).square().float(), inverse.flip(0, 1).float().neg_()


def _inverse(lower: Tensor) -> Tensor:
    """The inverse of a unit lower triangular matrix, by halves: products are twice as fast as solving."""
    if len(lower) <= _SOLVED:
        unit = torch.eye(len(lower), dtype=lower.dtype)
        return torch.linalg.solve_triangular(lower, unit, upper=False, unitriangular=True)
    half, found = len(lower) // 2, torch.zeros_like(lower)
    found[:half, :half] = first = _inverse(lower[:half, :half])
    found[half:, half:] = last = _inverse(lower[half:, half:])
    found[half:, :half] = -(last @ (lower[half:, :half] @ first))
    return found


def important_first(columns: Tensor) -> Tensor:
    """Columns by falling second moment (GPTQ's activation order)."""
    return columns.diagonal().argsort(descending=True, stable=True)


def factored(evidence: Evidence, *, ordered: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Order of processing and the two results of :func:`factor`, computed once for all settings of a site."""
    key = f"factored {ordered}"
    if key not in evidence.cache:
        columns = evidence.columns
        if columns is None:
            raise ValueError("evidence without a moment has nothing to factor")
        order = important_first(columns) if ordered else torch.arange(len(columns))
        evidence.cache[key] = (order, *factor(columns, order))
    return evidence.cache[key]


def swept(
    weight: Tensor,
    order: Tensor,
    rounded: Callable[[slice, Tensor], Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    chunk: int = _CHUNK,
) -> Tensor:
    """What a sweep over the columns of a matrix finds, (rows, columns); rows are independent and go by chunks.

    Parameters
    ----------
    weight
        (rows, columns).
    order
        The columns in the order of processing, (columns,).
    rounded
        Called with some rows and their weights (columns, rows) in that order, which it may overwrite; returns what it
        finds in place of them, usually by :func:`round_columns` or :func:`round_blocks`.
    dtype
        Of what is found.
    chunk
        Approximate weights of a chunk.
    """
    found = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    height = max(1, chunk // max(weight.shape[1], 1))
    for start in range(0, len(weight), height):
        span = slice(start, min(start + height, len(weight)))
        found[span, order] = rounded(span, weight[span].t()[order].contiguous()).t().to(dtype)
    return found


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

    def sweep(start: int, targets: Tensor, feedback: Tensor, rounded: Tensor) -> None:
        for j, target in enumerate(targets):
            if j:
                target = torch.addmv(target, targets[:j].t(), feedback[:j, j])
            values = quantize(start + j, target)
            rounded[j] = values
            torch.sub(target, values, out=targets[j])

    return round_blocks(targets, feedback, sweep)


def round_blocks(targets: Tensor, feedback: Tensor, sweep: Sweep) -> Tensor:
    """Round blocks of columns, for compiled code that handles a whole block.

    Parameters
    ----------
    sweep
        Called with the position of a block's first column, its targets (width, rows), which it overwrites with ``F``,
        the feedback within the block (width, width), and where the rounded values go (width, rows).
    """
    rounded = torch.empty_like(targets)
    for start in range(0, len(targets), _BLOCK):
        span, rest = slice(start, start + _BLOCK), slice(start + _BLOCK, None)
        sweep(start, targets[span], feedback[span, span], rounded[span])
        if start + _BLOCK < len(targets):
            targets[rest].addmm_(feedback[span, rest].t(), targets[span])
    return rounded
