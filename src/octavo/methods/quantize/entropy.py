"""Entropy-constrained quantization: uniform steps, error feedback, rate-aware rounding, adaptive entropy coding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.calibrate import Evidence
from octavo.errors import RequestError
from octavo.forms import Form, Grid
from octavo.forms.grid import DIVISIONS, exponent_steps
from octavo.methods.base import Method, Setting, method
from octavo.methods.feedback import factored, round_columns
from octavo.methods.knobs import real

#: Rows are rounded in chunks: they do not depend on each other, a chunk fits the cache, and its vectors are short
#: enough that no operation is split over threads, whose meeting at every column would cost more than the work.
_CHUNK = 1 << 19
#: Mean magnitudes that rounding tells apart, in quarters of an octave of a step: 1/32 to 2048.
_LOW, _HIGH = -20, 44
_LARGEST = 2**30


@method(
    "entropy",
    family="quantize",
    preset="fast",
    source="ECSQ (Chou, Lookabaugh & Gray, 1989) with the error feedback of GPTQ (arXiv 2210.17323)",
)
@dataclass(frozen=True)
class Entropy(Method):
    """Uniform quantization without clipping, for an entropy coder, with steps set by sensitivity.

    With ``loss = 1/2 sum_i r[i] d[j] F[i, j]^2`` (:mod:`octavo.methods.feedback`) every weight is divided by its own
    step ``step / sqrt(r[i] d[j])``, so that a rounding error costs the same wherever it is made: at high rates the
    bytes of the whole network are then spent at one slope. In these units the matrix is rounded column by column with
    error feedback, and the level taken is the one of least ``error^2 + rate * bits``, where ``bits`` is its code length
    under the distribution of its magnitude class. The row and column steps are rounded to eighths of an octave and
    entropy-coded beside the codes.

    Parameters
    ----------
    rate
        Weight of a bit against squared error in units of the step. The slope of the high-rate curve of a uniform
        quantizer is ``ln(2) / 6 = 0.116``.
    levels
        Steps to try, as the bits that they would take of Gaussian weights at a high rate.
    """

    rate: float = 0.1
    levels: tuple[float, ...] = (15, 12.5, 10.5, 9, 7.75, 6.5, 5.5, 4.75, 4, 3.25, 2.5, 1.75, 1, 0.25, -0.5, -1.25, -2)

    elastic = "step"

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """Steps from fine to coarse, found from the spread of the weights in units of their steps."""
        deviation = _Prepared(weight, evidence).deviation()
        # The entropy of a Gaussian rounded finely is log2(deviation / step) + log2(2 pi e) / 2.
        steps = [deviation * 2 ** (2.05 - level) for level in self.levels]
        return [{"step": _rounded(step)} for step in steps] if deviation > 0 else [{"step": 1.0}]

    def encode(self, weight: Tensor, setting: Setting, evidence: Evidence) -> Form:  # noqa: D102
        return next(self.encode_all(weight, [setting], evidence))

    def encode_all(self, weight: Tensor, settings: Iterable[Setting], evidence: Evidence) -> Iterator[Form]:
        """All settings share the factorisation; each is one pass over the columns."""
        prepared = _Prepared(weight, evidence)
        for setting in settings:
            yield prepared.encode(real(self.name, setting, "step", 1e-30), self.rate)


def _rounded(step: float) -> float:
    """A step with a short decimal, so that plans are readable and survive a round trip through YAML."""
    return float(f"{step:.5g}")


class _Prepared:
    """A matrix in units in which one step size fits all of it."""

    def __init__(self, weight: Tensor, evidence: Evidence) -> None:
        self.weight, self.shape = weight.float(), tuple(weight.shape)
        columns = self.shape[1]
        if evidence.columns is None:
            self.order = torch.arange(columns)
            curvature, self.feedback = torch.ones(columns), None
        else:
            self.order, curvature, self.feedback = factored(evidence)
        # Zero weights would ask for infinite steps; they are bounded by what the exponents can hold.
        self.row_exponents = _exponents(evidence.rows.clamp_min(float(evidence.rows.max()) * 1e-12).clamp_min(1e-30))
        self.column_exponents = _exponents(curvature.clamp_min(float(curvature.max()) * 1e-12))
        self.row_steps = exponent_steps(self.row_exponents)
        self.column_steps = exponent_steps(self.column_exponents)
        if self.feedback is not None:
            # In units of steps F'[j] = F[j] / step[j]: the feedback from k to j is rescaled by step[k] / step[j].
            self.feedback = self.feedback * self.column_steps[:, None] / self.column_steps[None]

    def deviation(self) -> float:
        """Root mean square of the matrix in units of step 1."""
        # Divided first and scaled back last: the squares of large weights would overflow.
        units = self.weight[:, self.order] / self.row_steps[:, None] / self.column_steps
        largest = float(units.abs().max()) if units.numel() else 0.0
        return float((units / largest).square().mean().sqrt()) * largest if largest > 0 else 0.0

    def encode(self, step: float, rate: float) -> Grid:
        rows, columns = self.shape
        chunk = max(1, _CHUNK // columns)
        chunks = [self._chunk(slice(start, start + chunk), step, rate) for start in range(0, rows, chunk)]
        column_exponents = torch.empty_like(self.column_exponents)
        column_exponents[self.order] = self.column_exponents
        # Concatenation takes the widest type of all.
        codes = torch.cat(chunks) if chunks else torch.empty(self.shape, dtype=torch.int8)
        return Grid(codes, torch.full((1, 1), step), None, self.row_exponents, column_exponents)

    def _chunk(self, span: slice, step: float, rate: float) -> Tensor:
        """Codes of some rows in the narrowest type that holds them."""
        steps = self.row_steps[span] * step
        if self.feedback is None:
            rounded = _round_at_once((self.weight[span] / self.column_steps).div_(steps[:, None]), rate)
        else:
            rounded = torch.empty_like(self.weight[span])
            targets = (self.weight[span].t()[self.order] / self.column_steps[:, None]) / steps
            rounded[:, self.order] = _round_in_turn(targets, self.feedback, rate).t()
        largest = max(map(abs, map(float, torch.aminmax(rounded)))) if rounded.numel() else 0
        if not largest < _LARGEST:
            raise RequestError(f"entropy: a step of {step:g} is too fine for this matrix, its codes exceed {_LARGEST}")
        return rounded.to(torch.int8 if largest < 128 else torch.int16 if largest < 32768 else torch.int32)


def _round_at_once(targets: Tensor, rate: float) -> Tensor:
    """Rounded codes (rows, columns) of targets in units of steps. Without feedback no column waits for another."""
    size = targets.abs()
    leave, shift = _Thresholds(size.mean(1), size.mean(0), rate).everywhere()
    return shift.add_(size).floor_().masked_fill_(size <= leave, 0.0).copysign_(targets)


def _round_in_turn(targets: Tensor, feedback: Tensor, rate: float) -> Tensor:
    """Rounded codes (columns, rows) of targets in units of steps, with error feedback."""
    size = targets.abs()
    thresholds = _Thresholds(size.mean(0), size.mean(1), rate)

    def quantize(j: int, target: Tensor) -> Tensor:
        leave, shift = thresholds.of(j)
        size = target.abs()
        return torch.copysign(size.add(shift).floor_().masked_fill_(size <= leave, 0.0), target)

    return round_columns(targets, feedback, quantize)


class _Thresholds:
    """Decision thresholds of rate-aware rounding.

    Level ``q`` is preferred to ``q - 1`` when ``size > q - 1/2 + rate / 2 * (bits[q] - bits[q - 1])``. The increments
    are those of a Laplacian of the weight's own magnitude, predicted from its row and column (a rank-one model, which
    the coder's classes follow too): constant for q >= 2, and at q = 1 with the bit for the sign.

    Magnitudes are rounded to quarters of an octave, so that thresholds are looked up and not computed.

    Parameters
    ----------
    across, along
        Mean magnitudes of the rows and of the columns in units of steps.
    """

    def __init__(self, across: Tensor, along: Tensor, rate: float) -> None:
        across, along = across.clamp_min(1e-30), along.clamp_min(1e-30)
        self._rows = (across.log2() * 4).round().long()
        self._columns = ((along / along.mean()).log2() * 4).round().long()
        mean = 2 ** (torch.arange(_LOW, _HIGH + 1, dtype=torch.float64) / 4)
        # Laplacian with mean magnitude m: the probability of a level falls by exp(-1 / m) from one to the next.
        bits = 1 / mean / math.log(2)
        half = torch.exp(-0.5 / mean)
        leave = torch.maximum(torch.log2(2 / (half * (1 + half))), bits)
        # Half a step more, and a level that the data do contain would never be taken.
        self._leave = (0.5 + (leave * (rate / 2)).clamp_max_(0.45)).float()
        self._shift = (0.5 - (bits * (rate / 2)).clamp_max_(0.45)).float()
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, column: int) -> tuple[Tensor, Tensor]:
        """For a column, (rows,) each: sizes up to the first are zero, larger ones get the second and are floored."""
        key = int(self._columns[column])
        if key not in self._known:
            index = (self._rows + key).clamp_(_LOW, _HIGH) - _LOW
            self._known[key] = (self._leave[index], self._shift[index])
        return self._known[key]

    def everywhere(self) -> tuple[Tensor, Tensor]:
        """The same for all columns, (rows, columns) each."""
        # Few columns differ in their magnitude, and copying columns is faster than looking every weight up.
        kinds, kind = self._columns.unique(return_inverse=True)
        index = (self._rows[:, None] + kinds).clamp_(_LOW, _HIGH).sub_(_LOW)
        return self._leave[index].index_select(1, kind), self._shift[index].index_select(1, kind)


def _exponents(weights: Tensor) -> Tensor:
    """Nearest step exponents of ``1 / sqrt(weights)``."""
    return (-0.5 * weights.double().log2() * DIVISIONS).round().clamp(-120 * DIVISIONS, 120 * DIVISIONS).to(torch.int16)
