"""Truncated singular value decomposition."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.calibration.evidence import Evidence
from octavo.forms import Form
from octavo.methods.base import Method, Setting, method
from octavo.methods.factorize import factors


@method("svd", family="factorize", preset="best", source="Eckart & Young (1936)")
@dataclass(frozen=True)
class SVD(Method):
    """``W = left @ right`` with ``left = U S^(1/2)``, ``right = S^(1/2) V^T``: the nearest matrix of that rank.

    ``W`` is (rows, columns), ``left`` (rows, rank), ``right`` (rank, columns). Both are quantized with one step in
    units of the error of the product (:func:`octavo.methods.factorize.factors.quantized`). Evidence is not used.
    """

    takes = ("rank", "bits")

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """Ranks, from the one at which the factors are as large as the matrix, times bits per coefficient."""
        return factors.settings(*weight.shape)

    def encode(self, weight: Tensor, setting: Setting, evidence: Evidence) -> Form:  # noqa: D102
        return next(self.encode_all(weight, [setting], evidence))

    def encode_all(self, weight: Tensor, settings: Iterable[Setting], evidence: Evidence) -> Iterator[Form]:
        """All settings share the decomposition."""
        plain = Evidence(torch.ones(len(weight)), None)
        parts = factors.factors(weight, plain)
        for setting in settings:
            rank, bits = factors.read(self.name, setting)
            yield factors.quantized(parts.first(rank), bits, plain)
