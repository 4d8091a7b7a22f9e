"""Round to nearest: the simplest quantizer and the baseline for all others."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from octavo.calibration.evidence import Evidence
from octavo.forms import Form
from octavo.methods.base import Method, Setting, method
from octavo.methods.quantize.grids import SETTINGS, fit, kernel_settings, nearest


@method("rtn", family="quantize", source="Round to nearest on a grid per group")
@dataclass(frozen=True)
class RoundToNearest(Method):
    """Every weight becomes the nearest point of its group's grid, without using evidence.

    ``codes[i, j] = clamp(round(W[i, j] / scale[i, g]) + zero[i, g], 0, 2^bits - 1)`` with ``W`` (rows, columns) and
    ``scale``, ``zero`` (rows, groups) fitted to the extremes of every group (:mod:`octavo.methods.quantize.grids`).

    Parameters
    ----------
    symmetric
        Grids around zero, without zero points.
    """

    by_rows = True
    takes = ("bits", "group", "symmetric", "scale")
    plain = True

    symmetric: bool = False

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """8 to 2 bits in groups of 64."""
        return [dict(setting) for setting in SETTINGS]

    def kernel_settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """8 bits with one scale per row, and 4 bits in every group size that the kernel supports."""
        return kernel_settings(weight)

    def fineness(self, setting: Setting) -> tuple[float, float]:
        """Bits, and groups a column."""
        return (setting["bits"], 0.0 if setting["group"] == "row" else 1 / setting["group"])

    def encode(self, weight: Tensor, setting: Setting, evidence: Evidence) -> Form:  # noqa: D102
        fitted = fit(self.name, weight, setting, self.symmetric)
        return fitted.grid(nearest(weight.float(), fitted))
