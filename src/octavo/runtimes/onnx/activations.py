"""The expected loss of rounding a site's inputs to 8 bits, in the same currency as that of its weights.

An integer kernel rounds its inputs at run time, with a step ``D`` from their range. The error of an input is uniform
with variance ``D^2 / 12``, and independent of the others. The expected increase of the model's loss is

    1/2 * sum_i rows[i] * sum_j W[i, j]^2 * D[j]^2 / 12

with the row weights of :mod:`octavo.calibration.evidence` and ``W`` (rows, columns).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.forms import Form, Grid, LowRank, Sum
from octavo.forms.grid import exponent_steps
from octavo.runtimes.lowering import Lowering
from octavo.runtimes.onnx.kernels import BLOCK_WIDTHS, FLOAT, INT8, kernel_of
from octavo.sources.batches import Batch, run
from octavo.sources.source import Source

#: Inner values of a factored layer are not watched; they are assumed Gaussian, in a range of this many standard
#: deviations.
_DEVIATIONS = 9.0


@dataclass
class Ranges:
    """Statistics of one site's inputs.

    Parameters
    ----------
    low, high
        (batches, columns): extremes of every column in every batch.
    blocks
        Maps a group size to the mean over positions of the squared largest magnitude per group, (groups,).
    """

    low: list[Tensor] = field(default_factory=list)
    high: list[Tensor] = field(default_factory=list)
    blocks: dict[int, Tensor] = field(default_factory=dict)
    positions: int = 0

    def add(self, x: Tensor) -> None:
        """Add the inputs of one batch, (..., columns)."""
        flat = x.detach().float().reshape(-1, x.shape[-1])
        self.low.append(flat.amin(0))
        self.high.append(flat.amax(0))
        for width in BLOCK_WIDTHS:
            if flat.shape[1] % width == 0:
                largest = flat.abs().reshape(len(flat), -1, width).amax(2)
                self.blocks[width] = self.blocks.get(width, 0) + largest.square().sum(0)
        self.positions += len(flat)


def watch(source: Source, sites: Iterable[str], batches: Sequence[Batch]) -> dict[str, Ranges]:
    """Input ranges of ``sites`` over ``batches``, including padding, since the kernel sees it too."""
    found: dict[str, Ranges] = {}
    handles = []
    assert source.module is not None

    def note(name: str) -> Any:
        def hook(module: Any, args: tuple) -> None:
            found.setdefault(name, Ranges()).add(args[0])

        return hook

    try:
        holders = source.holders()
        for name in sites:
            handles += [holder.register_forward_pre_hook(note(name)) for holder in holders.get(name, [])]
        with torch.inference_mode():
            for batch in batches:
                run(source.module, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


#: Expected loss when a kernel rounds the inputs of a form, by forms of several steps.
_losses = Lowering[Callable[[Any, str, Evidence, Ranges], float]]("loss by rounded inputs")
#: Variance of what is rounded off each input, (columns,), by the forms that run on an integer kernel in one step.
variances = Lowering[Callable[[Any, Ranges], Tensor]]("variance of rounded inputs")


def rounding_loss(form: Form, kernel: str, evidence: Evidence, ranges: Ranges) -> float:
    """Expected increase of the model's loss when ``kernel`` rounds the inputs of a form."""
    if kernel == FLOAT or kernel_of(form) == FLOAT:
        return 0.0
    loss = _losses.find(form)
    return _through(form.dense(), form, evidence, ranges) if loss is None else loss(form, kernel, evidence, ranges)


@_losses(LowRank)
def _low_rank(form: LowRank, kernel: str, evidence: Evidence, ranges: Ranges) -> float:
    inner = form.right.dense()
    deviations = ((inner @ evidence.moment(inner.shape[1])) * inner).sum(1).clamp_min(0).sqrt()
    reach = deviations * _DEVIATIONS / 2
    # Rounding errors of the first factor pass through both.
    first = _through(form.dense(), form.right, evidence, ranges)
    return first + rounding_loss(form.left, kernel, evidence, Ranges([-reach], [reach]))


@_losses(Sum)
def _sum(form: Sum, kernel: str, evidence: Evidence, ranges: Ranges) -> float:
    return sum(rounding_loss(part, kernel, evidence, ranges) for part in (form.base, form.correction))


def _through(weight: Tensor, form: Form, evidence: Evidence, ranges: Ranges) -> float:
    """Expected loss when inputs are rounded as ``form`` requires and multiplied with ``weight``."""
    if kernel_of(form) == FLOAT:
        return 0.0
    variance = variances.find(form)
    if variance is None:
        raise RequestError(f"{variances.missing(form)}; what its kernel loses cannot be foreseen")
    return float(evidence.rows @ (weight.square() @ variance(form, ranges))) / 2


@variances(Grid)
def _grid(form: Grid, ranges: Ranges) -> Tensor:
    smooth = torch.ones(form.shape[1]) if form.columns is None else exponent_steps(form.columns)
    if kernel_of(form) == INT8:
        low, high = (torch.stack(side) * smooth for side in (ranges.low, ranges.high))
        # The range always includes zero.
        steps = (high.amax(1).clamp_min(0) - low.amin(1).clamp_max(0)) / 255
        return steps.square().mean() / 12 / smooth.square()
    width = form.shape[1] // form.scale.shape[1]
    return (ranges.blocks[width] / ranges.positions / 127**2 / 12).repeat_interleave(width)


def rounding_losses(
    forms: Mapping[str, Form],
    kernels: Mapping[str, str],
    evidence: Mapping[str, Evidence],
    ranges: Mapping[str, Ranges],
) -> dict[str, float]:
    """Expected increase of the model's loss by site, for sites with rounded inputs and statistics."""
    return {
        name: rounding_loss(forms[name], kernel, evidence[name], ranges[name])
        for name, kernel in kernels.items()
        if name in ranges and name in evidence
    }
