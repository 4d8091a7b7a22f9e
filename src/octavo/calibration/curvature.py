"""Curvature of the loss in a site's weights, in the eigenbasis of its inputs and output gradients (K-FAC, EK-FAC).

A layer has inputs ``a`` and output gradients ``g``. Summed over the positions of an example they give ``G = sum g a^T``
(rows, columns). The Fisher matrix of its weights is ``F = E[vec(G) vec(G)^T]``. With the eigenbases of ``A = E[a a^T]``
and ``S = E[g g^T]``

    A = Q_A diag(alpha) Q_A^T,    S = Q_S diag(sigma) Q_S^T,
    F ~ (Q_S x Q_A) diag(Lam) (Q_S x Q_A)^T

K-FAC (Martens & Grosse, 2015) takes ``Lam[i, j] = sigma[i] alpha[j]``, which is right where ``g`` and ``a`` are
independent. EK-FAC (George et al., 2018, arXiv 1806.03884) measures ``Lam[i, j] = E[(Q_S^T G Q_A)[i, j]^2]``, the
diagonal nearest to ``F`` in that basis. Labels are drawn from the model itself (:mod:`octavo.calibration.objective`),
so ``F`` is the Gauss-Newton matrix; with true labels it would be the empirical Fisher matrix.

For a site of ``r`` rows and ``c`` columns it takes ``4 (r^2 + c^2 + r c)`` bytes, and twice the first two terms while
it is gathered.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from octavo.errors import RequestError

#: Damping added to the eigenvalues before inversion, as a share of their mean.
_DAMPING = 0.1


@dataclass(frozen=True)
class Curvature:
    """``F = (Q_S x Q_A) diag(Lam) (Q_S x Q_A)^T`` of a matrix (rows, columns).

    Parameters
    ----------
    outputs, inputs
        The bases ``Q_S`` (rows, rows) and ``Q_A`` (columns, columns), eigenvectors in columns. A subset of the rows of
        ``Q_S`` gives the loss of errors in these rows alone.
    output_values, input_values
        Eigenvalues ``sigma`` (rows,) and ``alpha`` (columns,) of the two moments.
    values
        ``Lam`` (rows, columns), in units of loss.
    """

    outputs: Tensor
    inputs: Tensor
    output_values: Tensor
    input_values: Tensor
    values: Tensor

    def rotated(self, matrix: Tensor) -> Tensor:
        """``Q_S^T M Q_A`` of one matrix, or of each of many (..., rows, columns)."""
        return self.outputs.to(matrix).t() @ (matrix @ self.inputs.to(matrix))

    def back(self, rotated: Tensor) -> Tensor:
        """``Q_S M Q_A^T``, the inverse of :meth:`rotated`."""
        return self.outputs.to(rotated) @ rotated @ self.inputs.to(rotated).t()

    def loss(self, error: Tensor) -> float:
        """``1/2 vec(E)^T F vec(E)``, the expected increase of the loss for an error (rows, columns)."""
        return float((self.values * self.rotated(error).square()).sum()) / 2

    def times(self, matrix: Tensor) -> Tensor:
        """``F vec(V)`` as a matrix."""
        return self.back(self.values.to(matrix) * self.rotated(matrix))

    def solve(self, matrix: Tensor, damping: float | None = None) -> Tensor:
        """``(F + damping)^-1 vec(V)`` as a matrix: ``Q_S [(Q_S^T V Q_A) / (Lam + damping)] Q_A^T``.

        ``damping`` is a tenth of the mean of ``Lam`` by default. 0 needs a curvature without zeros.
        """
        return self.back(self.rotated(matrix) / self._damped(damping).to(matrix))

    def inverse_diagonal(self, damping: float | None = None) -> Tensor:
        """The diagonal ``d`` of ``(F + damping)^-1`` (rows, columns): pruning ``w`` alone costs ``w^2 / (2 d)``.

        ``damping`` is as in :meth:`solve`.
        """
        return self.outputs.square() @ (1 / self._damped(damping)) @ self.inputs.square().t()

    def _damped(self, damping: float | None) -> Tensor:
        damped = self.values + (_DAMPING * self.values.mean() if damping is None else damping)
        if not bool((damped > 0).all()):
            raise RequestError(
                f"a curvature of shape {tuple(self.values.shape)} has no inverse, since some eigenvalues are zero; "
                "give a damping above 0"
            )
        return damped

    def corrected(self, gradients: Tensor) -> Curvature:
        """A curvature with these bases and ``Lam`` measured on gradients (examples, rows, columns)."""
        return replace(self, values=self.rotated(gradients).square().mean(0))

    def simplified(self, *, inputs: bool = True, outputs: bool = True) -> Curvature:
        """The product of both moments without correction, or of one of them with the identity, for comparisons."""
        left = self.output_values if outputs else torch.ones_like(self.output_values)
        right = self.input_values if inputs else torch.ones_like(self.input_values)
        return replace(self, output_values=left, input_values=right, values=left[:, None] * right)

    def moments(self) -> tuple[Tensor, Tensor]:
        """``S`` (rows, rows) and ``A`` (columns, columns), whose product is the curvature without correction."""
        outputs = (self.outputs * self.output_values) @ self.outputs.t()
        return outputs, (self.inputs * self.input_values) @ self.inputs.t()

    def nearest(self) -> tuple[Tensor, Tensor]:
        """Row weights (rows,) and column moment (columns, columns) whose product is nearest in relative entropy.

        It has the same marginals, as in :func:`octavo.calibration.evidence.combined`: ``rows`` is each row's part of
        the trace, ``columns`` the sum over rows divided by the trace.
        """
        values = self.values.double()
        rows = self.outputs.double().square() @ values.sum(1)
        basis, total = self.inputs.double(), values.sum()
        # For a curvature of zeros all columns are equal.
        shares = values.sum(0) / total if bool(total > 0) else torch.ones_like(values[0]) / values.shape[1]
        columns = (basis * shares) @ basis.t()
        return rows.float(), ((columns + columns.t()) / 2).float()


def kronecker(outputs: Tensor, inputs: Tensor) -> Curvature:
    """K-FAC's curvature from ``S`` (rows, rows) and ``A`` (columns, columns)."""
    left, right = eigen(outputs), eigen(inputs)
    return Curvature(left[1], right[1], left[0], right[0], left[0][:, None] * right[0])


def eigen(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, clipped at zero, and eigenvectors of a second moment, computed in float64."""
    values, vectors = torch.linalg.eigh(moment.double())
    return values.clamp_min(0).to(moment.dtype), vectors.to(moment.dtype).contiguous()
