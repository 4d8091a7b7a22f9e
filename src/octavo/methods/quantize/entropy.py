"""Entropy-constrained quantization: uniform steps, error feedback, rate-aware rounding, adaptive entropy coding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from octavo.calibration.evidence import Evidence
from octavo.forms import Form
from octavo.methods.base import Setting, method
from octavo.methods.feedback import round_blocks, round_columns
from octavo.methods.knobs import real
from octavo.methods.quantize.units import Magnitudes, Stepped, StepUnits
from octavo.system.compiled import compiled


@method(
    "entropy",
    family="quantize",
    preset="fast",
    source="ECSQ (Chou, Lookabaugh & Gray, 1989) with the error feedback of GPTQ (arXiv 2210.17323)",
)
@dataclass(frozen=True)
class Entropy(Stepped):
    """Uniform quantization without clipping, for an entropy coder, with steps set by sensitivity.

    In units of its steps (:mod:`octavo.methods.quantize.units`) a matrix is rounded column by column with error
    feedback. The chosen level minimizes ``error^2 + rate * bits``, where ``bits`` is its code length under the
    distribution of its magnitude class. The row and column steps are entropy-coded as well.

    Parameters
    ----------
    rate
        Weight of one bit relative to the squared error in units of the step. The slope of the high-rate curve of a
        uniform quantizer is ``ln(2) / 6 = 0.116``.
    levels
        Steps to try, stated as the bits per Gaussian weight at a high rate.
    """

    by_rows = True
    learns = True
    takes = ("step",)

    rate: float = 0.1
    levels: tuple[float, ...] = (15, 12.5, 10.5, 9, 7.75, 6.5, 5.5, 4.75, 4, 3.25, 2.5, 1.75, 1, 0.25, -0.5, -1.25, -2)

    def encode_all(self, weight: Tensor, settings: Iterable[Setting], evidence: Evidence) -> Iterator[Form]:
        """All settings share the factorisation; each is one pass over the columns."""
        units = StepUnits(self.name, weight, evidence)
        at_once, in_turn = partial(_round_at_once, rate=self.rate), partial(_round_in_turn, rate=self.rate)
        for setting in settings:
            yield units.grid(real(self.name, setting, "step", 1e-38), at_once, in_turn)


def _round_at_once(targets: Tensor, rate: float) -> Tensor:
    """Rounded codes (rows, columns) of targets in units of steps. Without feedback, columns are independent."""
    size = targets.abs()
    leave, shift = _Thresholds(Magnitudes(size.mean(1), size.mean(0)), rate).everywhere()
    return shift.add_(size).floor_().masked_fill_(size <= leave, 0.0).copysign_(targets)


def _round_in_turn(targets: Tensor, feedback: Tensor, rate: float) -> Tensor:
    """Rounded codes (columns, rows) of targets in units of steps, with error feedback."""
    size = targets.abs()
    thresholds = _Thresholds(Magnitudes(size.mean(0), size.mean(1)), rate)
    quick = compiled(_sweep) if targets.device.type == "cpu" else None
    if quick is not None:
        rows, columns, leave, shift = thresholds.tables()

        def sweep(start: int, *block: Tensor) -> None:
            quick(*(tensor.numpy() for tensor in block), rows, columns[start : start + len(block[0])], leave, shift)

        return round_blocks(targets, feedback, sweep)

    def quantize(j: int, target: Tensor) -> Tensor:
        leave, shift = thresholds.of(j)
        size = target.abs()
        return torch.copysign(size.add(shift).floor_().masked_fill_(size <= leave, 0.0), target)

    return round_columns(targets, feedback, quantize)


def _sweep(
    targets: np.ndarray,
    feedback: np.ndarray,
    rounded: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    leave: np.ndarray,
    shift: np.ndarray,
) -> None:
    """Round a block of columns (:func:`octavo.methods.feedback.round_blocks`), for numba."""
    width, height = targets.shape
    last = np.int32(len(leave) - 1)
    for j in range(width):
        target = targets[j]
        for k in range(j):
            share, errors = feedback[k, j], targets[k]
            for i in range(height):
                target[i] += share * errors[i]
        for i in range(height):
            kind = min(max(rows[i] + columns[j], np.int32(0)), last)
            size = abs(target[i])
            value = np.float32(0)
            if size > leave[kind]:
                value = np.copysign(np.floor(size + shift[kind]), target[i])
            rounded[j, i] = value
            target[i] -= value


class _Thresholds:
    """Decision thresholds of rate-aware rounding.

    Level ``q`` is preferred to ``q - 1`` when ``size > q - 1/2 + rate / 2 * (bits[q] - bits[q - 1])``. The increments
    are those of a Laplacian of the weight's own magnitude, predicted from its row and column: constant for q >= 2, and
    at q = 1 with the bit for the sign.
    """

    def __init__(self, magnitudes: Magnitudes, rate: float) -> None:
        self._magnitudes, mean = magnitudes, magnitudes.means
        # Laplacian with mean magnitude m: the probability of a level falls by exp(-1 / m) from one to the next.
        bits = 1 / mean / math.log(2)
        half = torch.exp(-0.5 / mean)
        leave = torch.maximum(torch.log2(2 / (half * (1 + half))), bits)
        # With half a step more, a level that the data contain would never be chosen.
        self._leave = (0.5 + (leave * (rate / 2)).clamp_max_(0.45)).float()
        self._shift = (0.5 - (bits * (rate / 2)).clamp_max_(0.45)).float()
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, column: int) -> tuple[Tensor, Tensor]:
        """For a column, (rows,) each: sizes up to the first are zero, larger ones get the second and are floored."""
        key = self._magnitudes.key(column)
        if key not in self._known:
            index = self._magnitudes.classes(key)
            self._known[key] = (self._leave[index], self._shift[index])
        return self._known[key]

    def tables(self) -> tuple[np.ndarray, ...]:
        """Classes by row and by column, which add up to a weight's, and the thresholds by class."""
        rows, columns = self._magnitudes.offsets()
        return rows.int().numpy(), columns.int().numpy(), self._leave.numpy(), self._shift.numpy()

    def everywhere(self) -> tuple[Tensor, Tensor]:
        """Thresholds of all columns, (rows, columns) each."""
        # Columns have few distinct magnitudes, and copying columns is faster than a lookup per weight.
        index, kind = self._magnitudes.kinds()
        return self._leave[index].index_select(1, kind), self._shift[index].index_select(1, kind)
