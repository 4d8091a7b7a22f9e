"""Magnitude pruning: removing the smallest weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from octavo.calibration.evidence import Evidence
from octavo.forms import Form
from octavo.methods.base import Method, Setting, method
from octavo.methods.prune import masks


@method("magnitude", family="prune", preset="best", source="Han et al. (2015), arXiv 1506.02626")
@dataclass(frozen=True)
class Magnitude(Method):
    """Keep the largest ``|W[i, j]|`` of the whole matrix (or n of every m neighbours in a row), quantized uniformly.

    ``W`` is (rows, columns); exactly ``sparsity * rows * columns`` weights are pruned, plus those that the step of the
    survivors rounds to zero (:mod:`octavo.methods.prune.masks`). A setting without ``bits`` rounds no survivor.
    """

    by_rows = True
    takes = ("bits", "sparsity", "pattern")

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """Sparsities from 0.3 to 0.9, and 2:4 and 4:8 if they divide the columns."""
        return masks.settings(weight.shape[1])

    def encode(self, weight: Tensor, setting: Setting, evidence: Evidence) -> Form:  # noqa: D102
        request = masks.read(self.name, setting, weight.shape[1])
        weight = weight.float()
        mask = masks.choose(weight.abs(), request, by_row=False)
        return masks.quantized(weight, mask, request.bits, request.pattern)
