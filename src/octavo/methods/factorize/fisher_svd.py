"""Low-rank factors weighted by the full curvature of a layer, outputs and inputs together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.calibration.curvature import Curvature
from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.forms import Dense, Form, LowRank
from octavo.methods.base import Method, Setting, method
from octavo.methods.factorize import factors
from octavo.methods.factorize.activation_svd import ActivationSVD

#: A fit is solved exactly up to this product of rank squared and weights, to which its multiplications are
#: proportional.
_WORK = 1 << 31
#: Steps of conjugate gradients that improve a larger fit. On random matrices, at a third to a half of the full rank,
#: they took a tenth of the time of exact fits and kept nine tenths of their gain.
_STEPS = 8
#: Elements of the weighted factors held at once.
_ELEMENTS = 1 << 22


@method(
    "fisher-svd",
    family="factorize",
    preset="best",
    source="SVD whitened by both factors of K-FAC, fitted to EK-FAC (George et al., 2018, arXiv 1806.03884)",
)
@dataclass(frozen=True)
class FisherSVD(ActivationSVD):
    """A product of given rank that nearly minimizes ``1/2 sum Lam * (Q_S^T E Q_A)^2``.

    With ``W`` (rows, columns), and ``S`` and ``A`` the second moments of output gradients and inputs, it starts with
    the product of least ``trace(E^T S E A)``: the truncated SVD of ``S^(1/2) W A^(1/2)``, transformed back. Then the
    factors are fitted in turn to the corrected eigenvalues ``Lam`` (:mod:`octavo.calibration.curvature`): in the
    eigenbasis, with one factor ``U`` fixed, column ``j`` of the other is ``(U^T diag(Lam[:, j]) U)^-1 U^T diag(Lam[:,
    j]) W[:, j]``, which never raises the loss. Where ``rank^2 rows columns`` exceeds 2^31, conjugate gradients approach
    these columns instead. Both factors are quantized as in the other low-rank methods. Nothing is offered for evidence
    without a curvature (``curvature="kfac"``).

    Parameters
    ----------
    sweeps
        How often both factors are fitted; 0 for the product of ``S`` and ``A`` unchanged.
    """

    sweeps: int = 3

    by_curvature = True
    # Compressing for speed measures no curvature.
    speed_settings = Method.speed_settings

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """The settings of ``activation-svd`` if there is a curvature, else none."""
        return [] if evidence.curvature is None else factors.settings(*weight.shape)

    def encode_all(self, weight: Tensor, settings: Iterable[Setting], evidence: Evidence) -> Iterator[Form]:
        """All settings share the initial decomposition; settings of one rank share the fit."""
        if evidence.curvature is None:
            raise RequestError(
                f"{self.name}: this matrix has no measured curvature; use curvature='ekfac', which covers all layers "
                "except embeddings, grouped and transposed convolutions"
            )
        found: dict[int, factors.Factors] = {}
        fitting = Fitting(weight, evidence.curvature)
        for setting in settings:
            rank, bits = factors.read(self.name, setting)
            if rank not in found:
                found[rank] = fitting.of(rank, self.sweeps)
            yield factors.quantized(found[rank], bits, evidence)


class Fitting:
    """Factors of a matrix (rows, columns) under a curvature; all ranks share the initial decomposition."""

    def __init__(self, weight: Tensor, curvature: Curvature) -> None:
        self.curvature, self.target = curvature, curvature.rotated(weight.double())
        self.values = curvature.values.double()
        # In the eigenbasis both moments are diagonal.
        self.begin = factors.whitened(self.target, curvature.output_values, curvature.input_values)

    def of(self, rank: int, sweeps: int) -> factors.Factors:
        """Factors of a rank after the given number of sweeps; 0 gives the whitened SVD."""
        found, curvature = self.begin.first(rank), self.curvature
        if sweeps and bool(self.target.any()) and bool(self.values.any()):
            left, right = found.left.double(), found.right.t().double()
            for _ in range(sweeps):
                right = _fitted(left, right, self.values, self.target)
                left = _fitted(right, left, self.values.t(), self.target.t())
            # Components by falling energy again, with equal weight on both sides, as the quantizer expects.
            found = factors.whitened(left @ right.t(), curvature.output_values, curvature.input_values, rank)
        left, right = curvature.outputs @ found.left, found.right @ curvature.inputs.t()
        return factors.Factors(left, right, found.values)


def fitted(weight: Tensor, curvature: Curvature, share: float, *, sweeps: int = 3) -> LowRank:
    """The unquantized product of nearly the least loss under a curvature, to be trained or compared.

    ``share`` is that of the rank at which both factors are as large as the matrix.
    """
    rank = max(1, round(share * weight.numel() / sum(weight.shape)))
    parts = Fitting(weight, curvature).of(rank, sweeps)
    return LowRank(Dense(parts.left), Dense(parts.right))


def _fitted(factor: Tensor, other: Tensor, values: Tensor, target: Tensor) -> Tensor:
    """The other factor (columns, rank) of ``factor @ other.T``, fitted to the target."""
    if factor.shape[1] ** 2 * target.numel() <= _WORK:
        return _solved(factor, values, target)
    return _improved(factor, other, values, target)


def _solved(factor: Tensor, values: Tensor, target: Tensor) -> Tensor:
    """For every column ``j`` the row ``x`` that minimizes ``sum_i values[i, j] (target[i, j] - factor[i] x)^2``."""
    rows = []
    for some in torch.arange(target.shape[1]).split(max(1, _ELEMENTS // factor.numel())):
        heavy = factor.t() * values[:, some].t()[:, None]
        normal = heavy @ factor
        # Zero components stay zero through the ridge.
        normal.diagonal(dim1=1, dim2=2).add_(float(normal.diagonal(dim1=1, dim2=2).max()) * 1e-12)
        rows.append(torch.linalg.solve(normal, heavy @ target[:, some].t()[:, :, None])[..., 0])
    return torch.cat(rows)


def _improved(factor: Tensor, other: Tensor, values: Tensor, target: Tensor) -> Tensor:
    """Rows ``x`` (columns, rank) moved towards those of :func:`_solved`, all at once, which never raises the loss."""
    diagonal = values.t() @ factor.square()
    ridge = float(diagonal.max()) * 1e-12
    scale = 1 / (diagonal + ridge)
    found, rest = other.clone(), (values * (target - factor @ other.t())).t() @ factor
    direction = scale * rest
    size = (rest * direction).sum(1)
    for _ in range(_STEPS):
        seen = factor @ direction.t()
        curved = (values * seen.square()).sum(0) + ridge * direction.square().sum(1)
        # A column that is fitted exactly has nowhere to go.
        share = torch.where(curved > 0, size / curved, 0.0)[:, None]
        found += share * direction
        rest -= share * ((values * seen).t() @ factor + ridge * direction)
        scaled = scale * rest
        before, size = size, (rest * scaled).sum(1)
        direction = scaled + torch.where(before > 0, size / before, 0.0)[:, None] * direction
    return found
