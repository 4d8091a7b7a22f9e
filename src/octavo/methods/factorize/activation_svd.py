"""Low-rank factors that preserve a layer's outputs instead of its weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from octavo.calibration.evidence import Evidence
from octavo.forms import Form
from octavo.methods.base import Method, Setting, method
from octavo.methods.factorize import factors

#: Ranks for speed, as shares of that at which two factors have as many elements as the matrix; the least, and bits.
_RANKS, _LEAST_RANK, _BITS = (0.5, 0.25), 8, 6


@method("activation-svd", family="factorize", source="Truncated SVD of weights whitened on both sides")
@dataclass(frozen=True)
class ActivationSVD(Method):
    """The product of given rank with the least ``sum_i r[i] E[i] C E[i]^T``.

    ``left = diag(1 / sqrt r) U S^(1/2)``, ``right = S^(1/2) V^T L^-1`` from the SVD of ``diag(sqrt r) W L`` with ``C =
    L L^T`` (:mod:`octavo.methods.factorize.factors`). ``W`` is (rows, columns), ``left`` (rows, rank), ``right`` (rank,
    columns), ``r`` the weights of the outputs and ``C`` the second moment of the inputs: inputs that hardly vary use no
    rank. Both factors are quantized with one step in units of the loss.
    """

    takes = ("rank", "bits")

    elastic = "bits"

    def octaves(self, setting: Setting) -> float:  # noqa: D102
        return -float(setting["bits"])

    def at(self, setting: Setting, octaves: float) -> Setting:  # noqa: D102
        # Below 16, as settings require.
        return {**setting, "bits": round(min(max(-octaves, 1.0), 15.9999), 4)}

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """Ranks, from the one at which the factors are as large as the matrix, times bits per coefficient."""
        return factors.settings(*weight.shape)

    def speed_settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """Ranks at which two products are faster than one."""
        rows, columns = weight.shape
        ranks = [int(share * weight.numel() / (rows + columns)) for share in _RANKS]
        return [{"rank": rank, "bits": _BITS} for rank in ranks if rank >= _LEAST_RANK]

    def encode(self, weight: Tensor, setting: Setting, evidence: Evidence) -> Form:  # noqa: D102
        return next(self.encode_all(weight, [setting], evidence))

    def encode_all(self, weight: Tensor, settings: Iterable[Setting], evidence: Evidence) -> Iterator[Form]:
        """All settings share the decomposition."""
        parts = factors.factors(weight, evidence)
        for setting in settings:
            rank, bits = factors.read(self.name, setting)
            yield factors.quantized(parts.first(rank), bits, evidence)
