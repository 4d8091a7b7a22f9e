"""Scalar codebooks by weighted k-means."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.calibration.evidence import Evidence
from octavo.forms import Codebook, Form
from octavo.methods.base import Method, Setting, method
from octavo.methods.feedback import factored, round_columns, swept
from octavo.methods.knobs import whole
from octavo.methods.quantize.grids import compact

_SIZES = (256, 64, 32, 16, 8, 4)
#: Cells of the histogram: 32 for each value of the largest codebook.
_BINS = 8192
#: A row's scale takes 16 bits: half a bit per weight for a row of this length.
_SCALED_COLUMNS = 32


@method("kmeans", family="quantize", preset="best", source="Lloyd (1982); Han et al. (2015), arXiv 1510.00149")
@dataclass(frozen=True)
class KMeans(Method):
    """``W[i, j] = scale[i] * values[codes[i, j]]`` with values that minimize ``sum_ij r[i] d[j] E[i, j]^2``.

    ``W`` is (rows, columns) and ``d`` the cost of an error that later columns can compensate
    (:mod:`octavo.methods.feedback`); without feedback it is the diagonal of ``C``. This is one-dimensional k-means with
    weights ``r[i] scale[i]^2 d[j]``, solved on a histogram with equal cells in ``arcsinh(w)``: they are fine where
    weights are dense and cover any range, so outliers do no harm. Cells keep their exact weighted means; Lloyd's
    iteration on them starts from the quantiles of ``density^(1/3)``, which is optimal for many values. Then every
    column is rounded to the nearest values, with error feedback of the preceding columns.

    Parameters
    ----------
    row_scale
        Scale every row by its root mean square, if the row is long enough to justify the bytes.
    feedback
        Let later columns compensate the errors of earlier ones, as in GPTQ.
    iterations
        Largest number of Lloyd iterations; most matrices need fewer.
    """

    # The codebook is learned from all rows; those of a sample give nearly the same one.
    by_rows = True
    takes = ("values",)

    row_scale: bool = True
    feedback: bool = True
    iterations: int = 200

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """Codebooks of 256 to 4 values."""
        return [{"values": size} for size in _SIZES]

    def encode(self, weight: Tensor, setting: Setting, evidence: Evidence) -> Form:  # noqa: D102
        return next(self.encode_all(weight, [setting], evidence))

    def encode_all(self, weight: Tensor, settings: Iterable[Setting], evidence: Evidence) -> Iterator[Form]:
        """All settings share the histogram and the factorisation of the moment."""
        weight, importance, scale = weight.float(), evidence.rows.float(), None
        if self.row_scale and weight.shape[1] >= _SCALED_COLUMNS:
            peak = weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
            scale = compact(peak * (weight / peak).square().mean(1, keepdim=True).sqrt())
            weight = weight / scale.float()
            # Relative to the largest, whose square may overflow.
            importance = importance * (scale.float() / scale.float().max()).square().flatten()
        order, curvature, feedback = None, torch.ones(weight.shape[1]), None
        if evidence.columns is not None:
            curvature = evidence.columns.diagonal()
            if self.feedback:
                order, importances, feedback = factored(evidence)
                curvature = torch.empty_like(importances)
                curvature[order] = importances
        means, masses = _histogram(weight, importance[:, None], curvature[None])
        for setting in settings:
            size = whole(self.name, setting, "values", 1, 65536)
            values = _half(_lloyd(means, masses, size, self.iterations)).unique()
            codes = _nearest(weight, values.float(), order, feedback)
            yield Codebook(codes.to(torch.uint8 if len(values) <= 256 else torch.int32), values, scale)


def _nearest(weight: Tensor, values: Tensor, order: Tensor | None, feedback: Tensor | None) -> Tensor:
    """Indices (rows, columns) of the nearest values, column after column if there is feedback."""
    edges = (values[1:] / 2 + values[:-1] / 2).contiguous()
    if order is not None and feedback is not None:

        def rounded(rows: slice, targets: Tensor) -> Tensor:
            return round_columns(targets, feedback, lambda j, target: values[torch.bucketize(target, edges)])

        weight = swept(weight, order, rounded)
    return torch.bucketize(weight, edges, out_int32=True)


def _histogram(weight: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted means and total weights of the cells in use, by rising mean, float64."""
    typical = weight.abs().mean().clamp_min(torch.finfo(torch.float32).tiny)
    warped = torch.asinh(weight / typical)
    low, high = float(warped.min()), float(warped.max())
    cells = warped.sub_(low).mul_((_BINS - 1) / max(high - low, 1e-6)).round_().to(torch.int64).flatten()
    # A weight whose input is always zero still belongs to some cell.
    importance = (rows * columns).clamp_min_(float(rows.max() * columns.max()) * 1e-9).clamp_min_(1e-30)
    masses = torch.bincount(cells, importance.flatten().double(), _BINS)
    sums = torch.bincount(cells, importance.mul_(weight).flatten().double(), _BINS)
    used = masses > 0
    means = sums[used] / masses[used]
    return means, masses[used]


def _lloyd(means: Tensor, masses: Tensor, size: int, iterations: int) -> Tensor:
    """Values of least weighted squared error on a histogram, float64."""
    if len(means) <= size:
        return means
    # Density is mass over cell width; each value gets an equal share of its cube root times the width.
    width = torch.gradient(means)[0].clamp_min(1e-300)
    shares = masses ** (1 / 3) * width ** (2 / 3)
    shares = shares.cumsum(0) / shares.sum()
    places = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    values = means[torch.searchsorted(shares, places).clamp_max(len(means) - 1)]
    zero = torch.zeros(1, dtype=torch.float64)
    mass, moment = torch.cat([zero, masses.cumsum(0)]), torch.cat([zero, (masses * means).cumsum(0)])
    for _ in range(iterations):
        edges = torch.searchsorted(means, (values[1:] + values[:-1]) / 2)
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), edges, torch.tensor([len(means)])])
        inside = mass[bounds].diff()
        centres = torch.where(inside > 0, moment[bounds].diff() / inside, values)
        if torch.equal(centres, values):
            break
        values = centres
    return values


def _half(values: Tensor) -> Tensor:
    """The values as float16 if its range allows it, else float32."""
    size = values.abs()
    fits = float(size.max()) <= 65504.0 and float(size.median()) >= 2.0**-14
    return values.half() if fits else values.float()
