"""What the low-rank methods share: whitened truncated factors, and their quantization.

With row weights ``r`` and column moment ``C = L L^T`` the loss of a rank-``k`` ``left @ right`` is

    sum_i r[i] E[i] C E[i]^T = |diag(sqrt r) W L - U S V^T|^2,    U S V^T the truncated SVD of diag(sqrt r) W L
    left = diag(1 / sqrt r) U S^(1/2),    right = S^(1/2) V^T L^-1

Only the Gram matrix of the smaller side is decomposed: with more rows than columns ``L^T W^T
diag(r) W L`` gives ``V`` and ``left = W L V S^(-1/2)``; otherwise ``diag(sqrt r) W C W^T diag(sqrt r)`` gives ``U``
and ``right = S^(-1/2) U^T diag(sqrt r) W``, without any inverse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.evidence import Evidence
from octavo.forms import Form, LowRank
from octavo.methods.base import Setting
from octavo.methods.feedback import factored
from octavo.methods.knobs import real, whole
from octavo.methods.quantize.entropy import Entropy

#: Ranks, as shares of the rank whose factors have as many elements as the matrix, with bits a coefficient: the hull of
#: what MiniLM's matrices want. Many components in few bits beat few in many.
_CHOICES: tuple[tuple[float, float], ...] = (
    (1.0, 6), (1.0, 4), (1.0, 3), (1.0, 2.5), (0.75, 3), (1.0, 2), (0.75, 2.5), (0.75, 2), (0.5, 2.5), (0.5, 2),
    (0.35, 2.5), (0.35, 2), (0.25, 2.5), (0.25, 2), (0.25, 1.5), (0.125, 2.5), (0.125, 1.5), (0.0625, 2),
)  # fmt: skip


@dataclass(frozen=True)
class Factors:
    """``left @ right`` with components by falling share of the energy.

    Parameters
    ----------
    left, right
        (rows, components) and (components, columns).
    values
        (components,) singular values in units of the square root of the loss.
    """

    left: Tensor
    right: Tensor
    values: Tensor

    def first(self, rank: int) -> Factors:
        """The best factors of that rank."""
        return Factors(self.left[:, :rank], self.right[:rank], self.values[:rank])


def factors(weight: Tensor, evidence: Evidence, most: int | None = None) -> Factors:
    """Factors of all components above rounding errors, at least one and at most ``most``."""
    rows, columns = weight.shape
    # Scaled, so that no square is out of range.
    unit = float(weight.abs().max()) or 1.0
    matrix = weight.double() / unit
    weights = evidence.rows.double()
    weights = weights.clamp_min(float(weights.max()) * 1e-9).clamp_min(1e-30)
    moment = None if evidence.columns is None else evidence.columns.double()
    if rows >= columns:
        root = torch.eye(columns, dtype=torch.float64) if moment is None else torch.linalg.cholesky(moment)
        inner = root.t() @ (matrix.t() @ (matrix * weights[:, None])) @ root
        values, vectors = _largest(inner, most)
        left = matrix @ (root @ vectors / values.sqrt())
        right = torch.linalg.solve_triangular(root, (vectors * values.sqrt()).t(), upper=False, left=False)
    else:
        scaled = matrix * weights.sqrt()[:, None]
        values, vectors = _largest((scaled if moment is None else scaled @ moment) @ scaled.t(), most)
        left = vectors * values.sqrt() / weights.sqrt()[:, None]
        right = (vectors / values.sqrt()).t() @ scaled
    return Factors((left * math.sqrt(unit)).float(), (right * math.sqrt(unit)).float(), (values * unit).float())


def _largest(gram: Tensor, most: int | None) -> tuple[Tensor, Tensor]:
    """Singular values and vectors from a Gram matrix, largest first."""
    squares, vectors = torch.linalg.eigh((gram + gram.t()) / 2)
    squares, vectors = squares.flip(0), vectors.flip(1)
    count = max(1, int((squares > float(squares[0]) * 1e-13).sum()))
    count = min(count, most or count)
    # A matrix of zeros has one component, of nothing.
    values = squares[:count].clamp_min(0).sqrt()
    values = torch.where(values > 0, values, torch.ones_like(values))
    # The sign of an eigenvector is arbitrary: fixed here, so that the bytes do not depend on the library.
    vectors = vectors[:, :count]
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return values, vectors * signs


def settings(rows: int, columns: int) -> list[Setting]:
    """Ranks and bits, from largest to smallest file."""
    # A tall matrix is worth its full rank: the factors then are a rotation, whose own cost hardly counts.
    even = columns if rows > 8 * columns else rows * columns / (rows + columns)
    pairs = dict.fromkeys((max(1, round(share * even)), bits) for share, bits in _CHOICES)
    return [{"rank": rank, "bits": bits} for rank, bits in sorted(pairs, key=lambda pair: -pair[0] * pair[1])]


def read(method: str, setting: Setting) -> tuple[int, float]:
    """Check a setting ``{"rank": 96, "bits": 5}``."""
    return whole(method, setting, "rank", 1), real(method, setting, "bits", 1, 16)


def quantized(parts: Factors, bits: float, evidence: Evidence) -> Form:
    """Both factors by :class:`Entropy`, each with the evidence that the other one implies.

    An error of ``left[i, k]`` costs ``r[i] S[k]``, one of ``right[k]`` costs ``S[k]`` times the column moment. One
    step in units of the loss serves all coefficients, as in transform coding: strong components get more bits than
    weak ones, and ``bits`` is about their mean. The right factor is then fitted anew to the left one as it was
    stored: ``right = (L^T diag(r) L)^-1 L^T diag(r) W``, where ``W`` is the product of the exact factors.
    """
    left, right, values = parts.left, parts.right, parts.values
    step = _step(parts, bits)
    weights = evidence.rows.clamp_min(float(evidence.rows.max()) * 1e-9).clamp_min(1e-30)
    first = Entropy().encode(left, {"step": step}, Evidence(weights, torch.diag(values)))
    stored = first.dense().double()
    heavy = stored * weights.double()[:, None]
    normal = heavy.t() @ stored
    # Components rounded to nothing have nothing to fit: the ridge leaves them at zero.
    normal.diagonal().add_(float(normal.diagonal().max().clamp_min(1e-300)) * 1e-9)
    refitted = torch.linalg.solve(normal, (heavy.t() @ left.double()) @ right.double()).float()
    implied = Evidence(normal.diagonal().float(), evidence.columns)
    if evidence.columns is not None:
        factored(evidence)
        # What depends on the inputs alone serves all ranks.
        implied.cache.update((key, value) for key, value in evidence.cache.items() if key.startswith("factored"))
    second = Entropy().encode(refitted, {"step": step}, implied)
    return LowRank(first, second)


def _step(parts: Factors, bits: float) -> float:
    """The step at which the coefficients take about ``bits`` on average.

    In units of the loss the coefficients of component ``k`` have the root mean square ``S[k] / sqrt(rows)`` on the
    left and ``S[k] / sqrt(columns)`` on the right, and a Gaussian takes ``log2(deviation / step) + 2.05`` bits.
    """
    rows, columns = len(parts.left), parts.right.shape[1]
    spread = parts.values.double().log2().mean()
    mean = float(spread) - (rows * math.log2(rows) + columns * math.log2(columns)) / (rows + columns) / 2
    return float(f"{2.0 ** max(-120.0, min(mean + 2.05 - bits, 120.0)):.5g}")
