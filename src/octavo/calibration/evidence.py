"""Evidence: the statistics that calibration gathers at each site.

One forward and one backward pass over the calibration data give, for every site, the second-order cost of an error
``E`` in its matrix:

    expected loss = 1/2 * sum_i rows[i] * E[i] @ columns @ E[i].T

For a layer ``columns`` is the second moment of its inputs and ``rows`` that of the gradients at its outputs; for an
embedding ``columns`` is the second moment of the gradients at its output and ``rows`` the frequency of each token. This
is the Gauss-Newton matrix of the model's own divergence, with the usual independence of inputs and output gradients
(K-FAC; Martens & Grosse, 2015), so all sites and all families of methods are compared in one currency.

A tensor with two roles, such as an embedding that is also the head, has one term per role; their sum is the expected
loss (:func:`combined`).

Without that assumption a layer may have a measured curvature (EK-FAC; :mod:`octavo.calibration.curvature`), which then
gives the expected loss; ``rows`` and ``columns`` are the product nearest to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from octavo.calibration.curvature import Curvature
from octavo.errors import RequestError


@dataclass
class Evidence:
    """Statistics of the inputs and outputs of one site.

    Parameters
    ----------
    rows
        (rows,) weights of the rows in units of loss, damped.
    columns
        (columns, columns) second moment, damped; None for the identity.
    samples
        Number of positions seen (0: data-free).
    terms
        Rows and columns of every role of a tensor with several; ``rows`` and ``columns`` then approximate all of them.
    curvature
        Damped curvature of the whole matrix, if it was measured.
    """

    rows: Tensor
    columns: Tensor | None
    samples: int = 0
    #: Cache of results that depend only on the moments.
    cache: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    terms: tuple[tuple[Tensor, Tensor], ...] = ()
    curvature: Curvature | None = None

    def __getstate__(self) -> dict[str, Any]:
        # The cache is not sent to workers: computing it again is faster.
        return {**self.__dict__, "cache": {}}

    def loss(self, error: Tensor) -> float:
        """Expected increase of the whole model's loss for ``error`` (rows, columns)."""
        error = error.float()
        if self.curvature is not None:
            return self.curvature.loss(error)
        terms = self.terms or ((self.rows, self.columns),)
        return sum(_quadratic(error, rows, columns) for rows, columns in terms) / 2

    def moment(self, columns: int) -> Tensor:
        """The column moment as a dense (columns, columns) float32 matrix."""
        return torch.eye(columns) if self.columns is None else self.columns


def require_finite(moment: Tensor) -> None:
    """Raise if row weights or a second moment are not finite."""
    if not bool(torch.isfinite(moment).all()):
        raise RequestError(
            f"evidence of shape {tuple(moment.shape)} is not finite; calibrate with data for which the model's outputs "
            "and gradients are finite"
        )


def _quadratic(error: Tensor, rows: Tensor, columns: Tensor | None) -> float:
    squared = error.square() if columns is None else (error @ columns) * error
    return float(rows @ squared.sum(1))


def combined(roles: Sequence[Evidence]) -> Evidence:
    """Combine the evidence of all roles of a tensor.

    The loss is the sum over roles of ``rows[i] * columns[j, k]``. Methods need one product: the one with the same
    marginals, ``rows = sum_t trace(C_t) r_t`` and ``columns = sum_t sum(r_t) C_t / sum_t sum(r_t) trace(C_t)``, which
    is nearest to the sum in relative entropy. If no role costs anything, columns are the mean of the roles'.
    """
    if len(roles) == 1:
        return roles[0]
    terms = tuple((role.rows, role.columns) for role in roles if role.columns is not None)
    traces = [float(columns.double().trace()) for _, columns in terms]
    sums = [float(rows.double().sum()) for rows, _ in terms]
    total = sum(a * b for a, b in zip(sums, traces, strict=True))
    shares = [each / total if total > 0 else 1 / len(terms) for each in sums]
    rows = sum((rows * trace for (rows, _), trace in zip(terms, traces, strict=True)), torch.zeros(()))
    columns = sum((columns * share for (_, columns), share in zip(terms, shares, strict=True)), torch.zeros(()))
    return Evidence(rows, columns, max(role.samples for role in roles), terms=terms)
