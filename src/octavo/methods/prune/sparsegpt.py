"""SparseGPT: pruning and quantization in one sweep with error feedback."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from octavo.calibration.evidence import Evidence
from octavo.forms import Form
from octavo.methods.base import Method, Setting, method
from octavo.methods.feedback import factored, round_columns, swept
from octavo.methods.prune import masks

#: Columns whose mask is chosen together, or as many whole groups as fit: one feedback block, so that the costs are up
#: to date.
_BLOCK = 64


@method("sparsegpt", family="prune", source="SparseGPT (Frantar & Alistarh, 2023, arXiv 2301.00774)")
@dataclass(frozen=True)
class SparseGPT(Method):
    """Prune and round columns in sequence; later columns compensate the errors (optimal brain surgeon).

    With ``loss = 1/2 sum_ij r[i] d[j] F[i, j]^2`` (:mod:`octavo.methods.feedback`) pruning a weight costs ``r[i] d[j]
    target[i, j]^2``, where ``target`` is the weight after the feedback of the preceding columns and ``1 / d[j]`` the
    ``[H^-1]_jj`` of the paper. The mask of a block of columns is chosen by that cost when the sweep reaches it. The
    number of weights kept per block is set in advance by the costs in the whole matrix, since blocks differ. Survivors
    are rounded to the same uniform grid as in the other pruning methods; a setting without ``bits`` rounds none. ``W``
    is (rows, columns). Without a moment there is no feedback.

    Parameters
    ----------
    order
        Columns of large inputs first. n:m patterns need adjacent columns and keep their order.
    """

    by_rows = True
    takes = ("bits", "sparsity", "pattern")

    order: bool = True

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """Sparsities from 0.3 to 0.9, and 2:4 and 4:8 if they divide the columns."""
        return masks.settings(weight.shape[1])

    def encode(self, weight: Tensor, setting: Setting, evidence: Evidence) -> Form:  # noqa: D102
        return next(self.encode_all(weight, [setting], evidence))

    def encode_all(self, weight: Tensor, settings: Iterable[Setting], evidence: Evidence) -> Iterator[Form]:
        """Settings that sweep the columns in the same order share the factorisation."""
        weight, rows = weight.float(), evidence.rows.float()
        # A row of zero importance still keeps its largest weights.
        rows = (rows / rows.max().clamp_min(1e-30)).clamp_min(1e-9)
        for setting in settings:
            request = masks.read(self.name, setting, weight.shape[1])
            if evidence.columns is None:
                mask = masks.choose(weight.square() * rows[:, None], request, by_row=False)
                yield masks.quantized(weight, mask, request.bits, request.pattern)
                continue
            factors = factored(evidence, ordered=self.order and request.pattern is None)
            yield _sweep(weight, rows, request, factors)


def _sweep(weight: Tensor, rows: Tensor, request: masks.MaskRequest, factors: tuple[Tensor, ...]) -> Form:
    """One pass over the columns in the order of their factors."""
    order, curvature, feedback = factors
    costs = rows[:, None] * curvature
    planned = masks.choose(weight[:, order].square() * costs, request, by_row=False)
    step = None if request.bits is None else masks.step_of(weight[:, order], planned, request.bits)
    mask = torch.empty(weight.shape, dtype=torch.bool)

    def survivors(rows: slice, targets: Tensor) -> Tensor:
        chosen = torch.empty(targets.shape, dtype=torch.bool)
        quantize = partial(_quantize, targets, costs[rows], planned[rows], chosen, step, request.pattern)
        values = round_columns(targets, feedback, quantize)
        mask[rows, order] = chosen.t()
        return values

    kept = swept(weight, order, survivors)
    if step is None:
        return masks.unrounded(kept, mask, request.pattern)
    return masks.survivors(kept.div_(step).round_(), mask, step, request.pattern)


def _quantize(
    targets: Tensor,
    costs: Tensor,
    planned: Tensor,
    chosen: Tensor,
    step: float | None,
    pattern: tuple[int, int] | None,
    j: int,
    target: Tensor,
) -> Tensor:
    """Prune and round the targets of column ``j``; at the first column of a block choose the survivors."""
    width = _BLOCK if pattern is None else _BLOCK // pattern[1] * pattern[1]
    if j % width == 0:
        block = slice(j, j + width)
        scores = targets[block].t().square() * costs[:, block]
        if pattern is not None:
            best = masks.largest_by_group(scores, pattern)
        else:
            best = masks.largest(scores, int(planned[:, block].sum()))
        chosen[block] = best.t()
    if step is None:
        return target * chosen[j]
    return (target / step).round_().mul_(chosen[j]).mul_(step)
