"""EoRA: a low-rank correction of a coarsely quantized matrix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from octavo.evidence import Evidence
from octavo.forms import Form, Sum
from octavo.methods.base import Method, Setting, method
from octavo.methods.factorize import factors
from octavo.methods.knobs import real, whole
from octavo.methods.quantize.entropy import Entropy


@method("eora", family="factorize", preset="best", source="EoRA (Liu et al., 2024, arXiv 2410.21271)")
@dataclass(frozen=True)
class EoRA(Method):
    """``base + left @ right``: what quantization lost, put back where the inputs have their energy.

    With ``W`` (rows, columns), ``base`` its entropy-constrained quantization, ``D = W - base`` and ``C = L L^T`` the
    second moment of the inputs, ``left @ right`` is the rank-``k`` matrix of least ``sum_i r[i] (D - left right)[i] C
    (D - left right)[i]^T``: ``U S V^T`` the truncated SVD of ``diag(sqrt r) D L``, ``left = diag(1 / sqrt r) U
    S^(1/2)``, ``right = S^(1/2) V^T L^-1``. Any square root ``L`` of ``C`` gives the same product as the paper's ``Q
    sqrt(eigenvalues)``; ``r``, the weights of the outputs, are added here.

    Parameters
    ----------
    ranks
        Ranks tried by :meth:`settings`, each with every base.
    bits
        Bits a coefficient of the correction: the paper finds 3 to 4 enough.
    levels
        Bits a weight of the bases tried.
    """

    ranks: tuple[int, ...] = (32, 16, 8)
    bits: int = 4
    levels: tuple[float, ...] = (3.25, 2.5, 1.9, 1.4, 0.9)

    by_rows = False

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """Bases that lose something to put back, each with all ranks up to half the smaller side."""
        rows, columns = weight.shape
        bases = Entropy(levels=self.levels).settings(weight, evidence)
        ranks = dict.fromkeys(min(rank, max(1, min(rows, columns) // 2)) for rank in self.ranks)
        correction = self.bits * (rows + columns) / (rows * columns)
        sized = [
            (level + rank * correction, {"step": base["step"], "rank": rank, "bits": self.bits})
            for base, level in zip(bases, self.levels, strict=False)
            for rank in ranks
        ]
        return [setting for _, setting in sorted(sized, key=lambda pair: -pair[0])]

    def encode(self, weight: Tensor, setting: Setting, evidence: Evidence) -> Form:  # noqa: D102
        return next(self.encode_all(weight, [setting], evidence))

    def encode_all(self, weight: Tensor, settings: Iterable[Setting], evidence: Evidence) -> Iterator[Form]:
        """Settings of one step share the base and the decomposition of what it lost."""
        weight = weight.float()
        known: dict[tuple[float, int], tuple[Form, factors.Factors]] = {}
        for setting in settings:
            step = real(self.name, setting, "step", 1e-38)
            rank, bits = whole(self.name, setting, "rank", 1), real(self.name, setting, "bits", 1, 16)
            key = step, max(rank, *self.ranks, 1)
            if key not in known:
                base = Entropy().encode(weight, {"step": step}, evidence)
                known[key] = base, factors.factors(weight - base.dense(), evidence, key[1])
            base, parts = known[key]
            yield Sum(base, factors.quantized(parts.first(rank), bits, evidence))
