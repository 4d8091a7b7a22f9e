"""Eight bits per weight with one scale per row, the layout of integer matrix kernels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.calibration.evidence import Evidence
from octavo.forms import Form, Grid
from octavo.forms.grid import DIVISIONS, exponent_steps
from octavo.methods.base import Method, Setting, method
from octavo.methods.feedback import factor, important_first, round_columns, swept
from octavo.methods.knobs import real

#: Smoothings to try if inputs are rounded too.
SMOOTHING = (0.0, 0.25, 0.5, 0.75)
_HIGHEST = 127
#: Column factors stay within these powers of two of each other.
_OCTAVES = 12


@method(
    "int8",
    family="quantize",
    preset="best",
    source="SmoothQuant (Xiao et al., 2023, arXiv 2211.10438) with the error feedback of GPTQ (arXiv 2210.17323)",
)
@dataclass(frozen=True)
class Int8(Method):
    """``W[i, j] = scale[i] * codes[i, j] / s[j]`` with codes of -127..127 and ``s[j] = C[j, j]^(smoothing / 2)``.

    ``W`` is (rows, columns), ``C`` (columns, columns) the second moment of the inputs ``x``. An integer kernel
    multiplies the codes with ``x / s``, which is rounded to 8 bits with one step. Dividing by ``s`` makes its columns
    similar, so outliers do not determine the step, and the weights absorb the scale. ``s`` is a power of two in eighths
    of an octave. The codes are rounded column by column with error feedback (:mod:`octavo.methods.feedback`), in the
    coordinates of ``x / s``.
    """

    by_rows = True
    takes = ("smoothing",)
    scales_inputs = True

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """The best smoothing for most layers; all take the same bytes, and none suits the weights better."""
        return [{"smoothing": 0.5 if evidence.columns is not None else 0.0}]

    def speed_settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """All smoothings: which of them serves best depends on what the inputs lose."""
        return [{"smoothing": share} for share in SMOOTHING]

    def encode(self, weight: Tensor, setting: Setting, evidence: Evidence) -> Form:  # noqa: D102
        return next(self.encode_all(weight, [setting], evidence))

    def encode_all(self, weight: Tensor, settings: Iterable[Setting], evidence: Evidence) -> Iterator[Form]:  # noqa: D102
        weight = weight.float()
        for setting in settings:
            exponents = column_exponents(evidence, weight.shape[1], real(self.name, setting, "smoothing", 0.0, 1.001))
            smooth = exponent_steps(exponents)
            scaled = weight * smooth
            scale = (scaled.abs().amax(1, keepdim=True) / _HIGHEST).clamp_min(torch.finfo(torch.float32).tiny)
            codes = _round(scaled / scale, evidence, smooth).to(torch.int8)
            yield Grid(codes, scale, None, None, None if not bool(exponents.any()) else -exponents)


def column_exponents(evidence: Evidence, columns: int, smoothing: float) -> Tensor:
    """``s`` in eighths of an octave, int16 of shape (columns,); zeros without a moment."""
    if evidence.columns is None or not smoothing:
        return torch.zeros(columns, dtype=torch.int16)
    octaves = evidence.columns.diagonal().double().clamp_min(1e-30).log2() * (smoothing / 2)
    octaves = (octaves - octaves.median()).clamp(-_OCTAVES, _OCTAVES)
    return (octaves * DIVISIONS).round().to(torch.int16)


def _round(targets: Tensor, evidence: Evidence, smooth: Tensor) -> Tensor:
    """Codes (rows, columns) of targets in units of their row's step."""
    if evidence.columns is None:
        return targets.round().clamp_(-_HIGHEST, _HIGHEST)
    moment = evidence.columns / smooth[:, None] / smooth
    order = important_first(moment)
    _, feedback = factor(moment, order)

    def rounded(rows: slice, targets: Tensor) -> Tensor:
        return round_columns(targets, feedback, lambda _, target: target.round().clamp_(-_HIGHEST, _HIGHEST))

    return swept(targets, order, rounded)
