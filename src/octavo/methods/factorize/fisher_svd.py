"""Low-rank factors weighted by the whole curvature of a layer: outputs together with inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.calibration.curvature import Curvature
from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.forms import Form
from octavo.methods.base import Method, Setting, method
from octavo.methods.factorize import factors
from octavo.methods.factorize.activation_svd import ActivationSVD

#: Larger ranks are left where they begin: fitting takes multiplications in proportion to rank squared times weights,
#: and where few components are left out there is little to gain.
_WORK = 1 << 31
#: Elements of the weighted factors that are held at once.
_ELEMENTS = 1 << 22


@method(
    "fisher-svd",
    family="factorize",
    preset="best",
    source="SVD whitened by both factors of K-FAC, fitted to EK-FAC (George et al., 2018, arXiv 1806.03884)",
)
@dataclass(frozen=True)
class FisherSVD(ActivationSVD):
    """The product of that rank of least ``1/2 sum Lam * (Q_S^T E Q_A)^2``, nearly.

    With ``W`` (rows, columns), and ``S`` and ``A`` the second moments of output gradients and inputs, it begins with
    the product of least ``trace(E^T S E A)``: the truncated SVD of ``S^(1/2) W A^(1/2)``, taken back. Then the factors
    are fitted in turn to the corrected eigenvalues ``Lam`` (:mod:`octavo.calibration.curvature`): in the eigenbasis,
    with one factor ``U`` held, column ``j`` of the other is ``(U^T diag(Lam[:, j]) U)^-1 U^T diag(Lam[:, j]) W[:, j]``,
    which never raises the loss. Both factors are quantized as in the other low-rank methods. Evidence without a
    curvature (``curvature="kfac"``) has nothing to offer it.

    Parameters
    ----------
    sweeps
        Times that both factors are fitted; 0 for the product of ``S`` and ``A`` as it is.
    """

    sweeps: int = 3

    by_curvature = True
    # Compressing for speed measures no curvature.
    speed_settings = Method.speed_settings

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """Those of ``activation-svd`` where there is a curvature, else none."""
        return [] if evidence.curvature is None else factors.settings(*weight.shape)

    def encode_all(self, weight: Tensor, settings: Iterable[Setting], evidence: Evidence) -> Iterator[Form]:
        """All settings share the decomposition from which the fit begins; those of one rank share the fit."""
        if evidence.curvature is None:
            raise RequestError(
                f"{self.name}: there is no curvature of this matrix; ask for curvature='ekfac', which measures that of "
                "every layer but embeddings, grouped and transposed convolutions"
            )
        found: dict[int, factors.Factors] = {}
        fitting = Fitting(weight, evidence.curvature)
        for setting in settings:
            rank, bits = factors.read(self.name, setting)
            if rank not in found:
                found[rank] = fitting.of(rank, self.sweeps)
            yield factors.quantized(found[rank], bits, evidence)


class Fitting:
    """Factors of a matrix (rows, columns) under a curvature; all ranks share where they begin."""

    def __init__(self, weight: Tensor, curvature: Curvature) -> None:
        self.curvature, self.target = curvature, curvature.rotated(weight.double())
        self.values = curvature.values.double()
        # In the eigenbasis both moments are diagonal.
        self.begin = factors.whitened(self.target, curvature.output_values, curvature.input_values)

    def of(self, rank: int, sweeps: int) -> factors.Factors:
        """Those of a rank after some sweeps; 0 gives the whitened SVD."""
        found, curvature = self.begin.first(rank), self.curvature
        if sweeps and bool(self.target.any()) and rank**2 * self.target.numel() <= _WORK:
            left = found.left.double()
            for _ in range(sweeps):
                right = _solved(left, self.values, self.target)
                left = _solved(right, self.values.t(), self.target.t())
            # Components by falling share again, of equal weight on both sides, as what quantizes them expects.
            found = factors.whitened(left @ right.t(), curvature.output_values, curvature.input_values, rank)
        left, right = curvature.outputs @ found.left, found.right @ curvature.inputs.t()
        return factors.Factors(left, right, found.values)


def _solved(factor: Tensor, values: Tensor, target: Tensor) -> Tensor:
    """For every column ``j`` the row ``x`` of least ``sum_i values[i, j] (target[i, j] - factor[i] x)^2``."""
    rows = []
    for some in torch.arange(target.shape[1]).split(max(1, _ELEMENTS // factor.numel())):
        heavy = factor.t() * values[:, some].t()[:, None]
        normal = heavy @ factor
        # Components of nothing have nothing to fit: the ridge leaves them at zero.
        normal.diagonal(dim1=1, dim2=2).add_(float(normal.diagonal(dim1=1, dim2=2).max()) * 1e-12)
        rows.append(torch.linalg.solve(normal, heavy @ target[:, some].t()[:, :, None])[..., 0])
    return torch.cat(rows)
