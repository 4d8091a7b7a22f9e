"""A matrix in units in which one step fits all weights, and the grid of its rounded values.

With ``loss = 1/2 sum_i r[i] d[j] F[i, j]^2`` (:mod:`octavo.methods.feedback`) every weight is divided by its own step
``step / sqrt(r[i] d[j])``, so that every rounding error costs the same: at high rates the bytes of the whole network
are then spent at one slope. Row and column steps are rounded to eighths of an octave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property

import torch
from torch import Tensor

from octavo.calibration.evidence import Evidence, require_finite
from octavo.errors import RequestError
from octavo.forms import Form, Grid
from octavo.forms.grid import DIVISIONS, exponent_steps
from octavo.methods.base import Method, Setting
from octavo.methods.feedback import factored

#: Rows are rounded in independent chunks that fit the cache. Their vectors are too short to be split over threads,
#: whose synchronisation at every column would cost more than the work.
_CHUNK = 1 << 19
#: Mean magnitudes that rounding distinguishes, in quarter octaves of a step: 1/32 to 2048.
_LOW, _HIGH = -20, 44
_LARGEST = 2**30


class StepUnits:
    """A matrix in units of its steps, for the method with the given name."""

    def __init__(self, method: str, weight: Tensor, evidence: Evidence) -> None:
        require_finite(evidence.rows)
        self.method = method
        self.weight, self.shape = weight.float(), tuple(weight.shape)
        columns = self.shape[1]
        if evidence.columns is None:
            self.order = torch.arange(columns)
            curvature, self.feedback = torch.ones(columns), None
        else:
            self.order, curvature, self.feedback = factored(evidence)
        # Zero weights would need infinite steps, so steps are bounded by the exponent range.
        self.row_exponents = _exponents(evidence.rows.clamp_min(float(evidence.rows.max()) * 1e-12).clamp_min(1e-30))
        self.column_exponents = _exponents(curvature.clamp_min(float(curvature.max()) * 1e-12))
        self.row_steps = exponent_steps(self.row_exponents)
        self.column_steps = exponent_steps(self.column_exponents)
        if self.feedback is not None:
            # In units of steps F'[j] = F[j] / step[j]: the feedback from k to j is rescaled by step[k] / step[j].
            self.feedback = self.feedback * self.column_steps[:, None] / self.column_steps[None]

    def steps(self, levels: Iterable[float]) -> list[float]:
        """The steps at which finely rounded Gaussian weights take the given bits; 1 if all weights are zero."""
        if not self.deviation:
            return [1.0]
        # Their entropy is log2(deviation / step) + log2(2 pi e) / 2. A short decimal is readable in a plan and survives
        # a round trip through YAML.
        return [float(f"{self.deviation * 2 ** (2.05 - level):.5g}") for level in levels]

    @cached_property
    def deviation(self) -> float:
        """Root mean square of the weights in these units."""
        # Divided first and scaled back last, since the squares of large weights would overflow.
        units = self._units()
        largest = float(units.abs().max()) if units.numel() else 0.0
        return float((units / largest).square().mean().sqrt()) * largest if largest > 0 else 0.0

    @property
    def finest(self) -> float:
        """A step whose codes all fit. The feedback of errors may add to a code: half of the range is left for it."""
        units = self._units()
        return 2 * float(units.abs().max()) / _LARGEST if units.numel() else 0.0

    def _units(self) -> Tensor:
        """The weights in these units, columns in the order of processing."""
        return self.weight[:, self.order] / self.row_steps[:, None] / self.column_steps

    def grid(
        self,
        step: float,
        at_once: Callable[[Tensor], Tensor],
        in_turn: Callable[[Tensor, Tensor], Tensor],
        *,
        chunk: int = _CHUNK,
        multiple: int = 1,
    ) -> Grid:
        """The matrix on a grid of ``step``.

        Parameters
        ----------
        step
            The divisor of the units.
        at_once
            Returns the codes of some rows, (rows, columns) both, without error feedback.
        in_turn
            Returns the codes of some rows, (columns, rows) both, with columns in the order of processing; the second
            argument is the feedback.
        chunk, multiple
            Approximate weights per chunk of rows, and the multiple of rows in every chunk except the last.

        Raises
        ------
        RequestError
            If codes exceed 31 bits.
        """
        rows, columns = self.shape
        height = max(1, chunk // columns // multiple) * multiple
        codes = [self._chunk(slice(i, i + height), step, at_once, in_turn) for i in range(0, rows, height)]
        column_exponents = torch.empty_like(self.column_exponents)
        column_exponents[self.order] = self.column_exponents
        # Concatenation uses the widest type.
        joined = torch.cat(codes) if codes else torch.empty(self.shape, dtype=torch.int8)
        return Grid(joined, torch.full((1, 1), step), None, self.row_exponents, column_exponents)

    def _chunk(
        self,
        span: slice,
        step: float,
        at_once: Callable[[Tensor], Tensor],
        in_turn: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Codes of some rows in the narrowest type that holds them."""
        steps = self.row_steps[span] * step
        if self.feedback is None:
            rounded = at_once((self.weight[span] / self.column_steps).div_(steps[:, None]))
        else:
            rounded = torch.empty_like(self.weight[span])
            targets = (self.weight[span].t()[self.order] / self.column_steps[:, None]) / steps
            rounded[:, self.order] = in_turn(targets, self.feedback).t()
        largest = max(map(abs, map(float, torch.aminmax(rounded)))) if rounded.numel() else 0
        if not largest < _LARGEST:
            raise RequestError(
                f"{self.method}: a step of {step:g} is too fine for this matrix, as its codes exceed {_LARGEST}; "
                "choose a coarser step"
            )
        return rounded.to(torch.int8 if largest < 128 else torch.int16 if largest < 32768 else torch.int32)


class Stepped(Method):
    """A method whose only knob is the step in these units."""

    elastic = "step"
    #: Steps to try, as the bits that they would take of Gaussian weights at a high rate.
    levels: tuple[float, ...]

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """Steps from fine to coarse, found from the spread of the weights in units of their steps."""
        return [{"step": step} for step in StepUnits(self.name, weight, evidence).steps(self.levels)]

    def encode(self, weight: Tensor, setting: Setting, evidence: Evidence) -> Form:  # noqa: D102
        return next(iter(self.encode_all(weight, [setting], evidence)))


class Magnitudes:
    """Classes of magnitude in a matrix of targets: a rank-one model, like the coder's classes.

    Magnitudes are rounded to quarter octaves, so that functions of them are table lookups.

    Parameters
    ----------
    across, along
        Mean magnitudes of the rows and of the columns in units of steps.
    """

    #: The mean magnitude of each class.
    means = 2 ** (torch.arange(_LOW, _HIGH + 1, dtype=torch.float64) / 4)

    def __init__(self, across: Tensor, along: Tensor) -> None:
        across, along = across.clamp_min(1e-30), along.clamp_min(1e-30)
        self._rows = (across.log2() * 4).round().long()
        self._columns = ((along / along.mean()).log2() * 4).round().long()

    def key(self, column: int) -> int:
        """The key shared by columns of one magnitude."""
        return int(self._columns[column])

    def classes(self, key: int) -> Tensor:
        """The class of each row's element, (rows,), in columns of a key."""
        return (self._rows + key).clamp_(_LOW, _HIGH) - _LOW

    def offsets(self) -> tuple[Tensor, Tensor]:
        """The contributions of rows (rows,) and columns (columns,) to a class, which is clamped to the valid range."""
        return self._rows - _LOW, self._columns

    def kinds(self) -> tuple[Tensor, Tensor]:
        """Classes of the distinct columns, (rows, kinds), and the index of each column among these, (columns,)."""
        kinds, kind = self._columns.unique(return_inverse=True)
        return (self._rows[:, None] + kinds).clamp_(_LOW, _HIGH).sub_(_LOW), kind


def _exponents(weights: Tensor) -> Tensor:
    """Nearest step exponents of ``1 / sqrt(weights)``."""
    return (-0.5 * weights.double().log2() * DIVISIONS).round().clamp(-120 * DIVISIONS, 120 * DIVISIONS).to(torch.int16)
