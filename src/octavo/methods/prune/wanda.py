"""Wanda: pruning by weights and activations."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from octavo.calibration.evidence import Evidence
from octavo.forms import Form
from octavo.methods.base import Method, Setting, method
from octavo.methods.prune import masks


@method("wanda", family="prune", preset="best", source="Wanda (Sun et al., 2023, arXiv 2306.11695)")
@dataclass(frozen=True)
class Wanda(Method):
    """Keep the largest ``|W[i, j]| * sqrt(C[j, j])`` of every row (or n of every m neighbours), quantized uniformly.

    ``W`` is (rows, columns) and ``sqrt(C[j, j])`` the root mean square of input ``j``. So small weights of large inputs
    are kept. Scores are compared within a row, so every output keeps the same number of inputs. Without a moment the
    scores are magnitudes. A setting without ``bits`` rounds no survivor.
    """

    by_rows = True
    takes = ("bits", "sparsity", "pattern")

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """Sparsities from 0.3 to 0.9, and 2:4 and 4:8 if they divide the columns."""
        return masks.settings(weight.shape[1])

    def encode(self, weight: Tensor, setting: Setting, evidence: Evidence) -> Form:  # noqa: D102
        request = masks.read(self.name, setting, weight.shape[1])
        weight = weight.float()
        scores = weight.abs()
        if evidence.columns is not None:
            scores = scores * evidence.columns.diagonal().sqrt()
        return masks.quantized(weight, masks.choose(scores, request, by_row=True), request.bits, request.pattern)
