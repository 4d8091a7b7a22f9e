"""Code shared by low-rank methods: whitened truncated factors, and their quantization.

With row weights ``r`` and column moment ``C = L L^T`` the loss of a rank-``k`` ``left @ right`` is

    sum_i r[i] E[i] C E[i]^T = |diag(sqrt r) W L - U S V^T|^2,    U S V^T the truncated SVD of diag(sqrt r) W L
    left = diag(1 / sqrt r) U S^(1/2),    right = S^(1/2) V^T L^-1

Only the Gram matrix of the smaller side is decomposed: with more rows than columns ``L^T W^T diag(r) W L`` gives ``V``
and ``left = W L V S^(-1/2)``; otherwise ``diag(sqrt r) W C W^T diag(sqrt r)`` gives ``U`` and ``right = S^(-1/2) U^T
diag(sqrt r) W``, without any inverse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.calibration.evidence import Evidence, require_finite
from octavo.errors import RequestError
from octavo.forms import Dense, Form, LowRank
from octavo.methods.base import Method, Setting
from octavo.methods.feedback import factored
from octavo.methods.knobs import real, whole
from octavo.methods.quantize.entropy import Entropy
from octavo.methods.quantize.units import StepUnits
from octavo.methods.tables import is_table

#: Ranks, as shares of the rank whose factors have as many elements as the matrix, with bits per coefficient: the hull
#: of the best choices for MiniLM's matrices. Many components in few bits beat few components in many bits.
_CHOICES: tuple[tuple[float, float], ...] = (
    (1.0, 6), (1.0, 4), (1.0, 3), (1.0, 2.5), (0.75, 3), (1.0, 2), (0.75, 2.5), (0.75, 2), (0.5, 2.5), (0.5, 2),
    (0.35, 2.5), (0.35, 2), (0.25, 2.5), (0.25, 2), (0.25, 1.5), (0.125, 2.5), (0.125, 1.5), (0.0625, 2),
)  # fmt: skip
_OF_TABLES = ((1.0, 6), (1.0, 4.5), (1.0, 3.5), (1.0, 2.75), (1.0, 2), (1.0, 1.4), (1.0, 1), (0.25, 1.5), (0.125, 1.5))


@dataclass(frozen=True)
class Factors:
    """``left @ right`` with components by falling energy.

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

    @property
    def losses(self) -> Tensor:
        """(components + 1,) error at every rank from 0: twice the expected loss of :class:`Evidence`."""
        squares = self.values.double().square().flip(0).cumsum(0).flip(0)
        return torch.cat([squares, squares.new_zeros(1)])

    def first(self, rank: int) -> Factors:
        """The best factors of the given rank."""
        return Factors(self.left[:, :rank], self.right[:rank], self.values[:rank])

    @property
    def form(self) -> LowRank:
        """The product, with both factors as they are."""
        return LowRank(Dense(self.left), Dense(self.right))


def factors(weight: Tensor, evidence: Evidence, most: int | None = None) -> Factors:
    """Factors of all components above rounding errors, at least one and at most ``most``."""
    weights = evidence.rows.double()
    return whitened(weight, weights.clamp_min(float(weights.max()) * 1e-9).clamp_min(1e-30), evidence.columns, most)


def whitened(
    weight: Tensor,
    left: Tensor | None = None,
    right: Tensor | None = None,
    most: int | None = None,
    *,
    damping: float = 0.0,
) -> Factors:
    """The best approximation of every rank under weights on both sides.

    For every rank ``k``, ``first(k)`` minimizes ``trace(E^T left E right)`` over all matrices of that rank, with ``E =
    weight - left_factor @ right_factor``: the truncated SVD of ``A^T weight B`` with ``left = A A^T``, ``right = B
    B^T``, multiplied by their inverses. The remaining error is ``sum(values[k:] ** 2)``.

    Parameters
    ----------
    weight
        (rows, columns).
    left, right
        Moments: None for the identity, a vector for a diagonal (token counts, output weights), or a symmetric matrix
        without negative eigenvalues (second moments of outputs' gradients, of inputs). If such a matrix does not have
        full rank, components in its null space are left out.
    most
        The largest number of components needed; for large matrices only these are computed if possible.
    damping
        Share of the mean diagonal added to the diagonal of both moments.
    """
    rows, columns = weight.shape
    # Scaled so that no square overflows.
    unit = float(weight.abs().max()) or 1.0
    if not math.isfinite(unit):
        raise RequestError(
            f"a matrix of {rows} x {columns} has NaN or Inf and cannot be decomposed; repair the weights"
        )
    matrix = weight.double() / unit
    ours, theirs = _Moment(left, rows, damping), _Moment(right, columns, damping)
    if rows >= columns:
        values, vectors = principal(theirs.root_t(theirs.root_t(matrix.t() @ ours.times(matrix)).t()), most)
        first = matrix @ theirs.root(vectors / values.sqrt())
        second = theirs.back(vectors * values.sqrt()).t()
    else:
        scaled = ours.root_t(matrix)
        values, vectors = principal(scaled @ theirs.times(scaled.t()), most)
        first = ours.back(vectors * values.sqrt())
        second = (vectors / values.sqrt()).t() @ scaled
    return Factors((first * math.sqrt(unit)).float(), (second * math.sqrt(unit)).float(), (values * unit).float())


class _Moment:
    """A moment ``M = A A^T``, and products with it, with its root ``A``, and with the inverse of ``A^T``."""

    def __init__(self, moment: Tensor | None, size: int, damping: float) -> None:
        self.moment = None if moment is None else moment.double()
        self.factor: Tensor | None = None
        self.inverse: Tensor | None = None
        if self.moment is None:
            return
        diagonal = self.moment if self.moment.ndim == 1 else self.moment.diagonal()
        if diagonal.shape != (size,):
            raise RequestError(f"a moment of shape {tuple(self.moment.shape)} does not fit a side of {size}")
        require_finite(self.moment)
        ridge = damping * float(diagonal.mean())
        if self.moment.ndim == 1:
            self.moment = self.moment + ridge
            self.factor = self.moment.clamp_min(0).sqrt()
            # Rows or columns of zero weight may get any value in the factors: zero is used.
            self.inverse = torch.where(self.factor > 0, 1 / self.factor, torch.zeros_like(self.factor))
            return
        if ridge:
            self.moment = self.moment + ridge * torch.eye(size).to(self.moment)
        factor, failed = torch.linalg.cholesky_ex(self.moment)
        self.factor = factor
        if int(failed) or float(factor.diagonal().min()) < 1e-7 * float(factor.diagonal().max()):
            values, vectors = torch.linalg.eigh((self.moment + self.moment.t()) / 2)
            seen = values > float(values[-1].clamp_min(0)) * 1e-12
            root = values.clamp_min(0).sqrt()
            self.factor = vectors * root
            self.inverse = vectors * torch.where(seen, 1 / root, torch.zeros_like(root))

    def times(self, x: Tensor) -> Tensor:
        """``M x``."""
        if self.moment is None:
            return x
        return x * self.moment[:, None] if self.moment.ndim == 1 else self.moment @ x

    def root(self, x: Tensor) -> Tensor:
        """``A x``."""
        if self.factor is None:
            return x
        return x * self.factor[:, None] if self.factor.ndim == 1 else self.factor @ x

    def root_t(self, x: Tensor) -> Tensor:
        """``A^T x``."""
        if self.factor is None:
            return x
        return x * self.factor[:, None] if self.factor.ndim == 1 else self.factor.t() @ x

    def back(self, x: Tensor) -> Tensor:
        """``A^-T x``."""
        if self.factor is None:
            return x
        if self.inverse is None:
            return torch.linalg.solve_triangular(self.factor.t(), x, upper=True)
        return x * self.inverse[:, None] if self.inverse.ndim == 1 else self.inverse @ x


#: If at most this share of the components of a Gram matrix above this size is needed, only they are computed. This uses
#: subspace iteration with at most this many steps and this many additional vectors, until ``G V - V S`` is at most this
#: share of the largest value.
_FEW, _LARGE = 1 / 8, 1024
_STEPS, _SPARE, _EXACT = 24, 16, 1e-6


def _leading(gram: Tensor, most: int) -> tuple[Tensor, Tensor] | None:
    """The ``most`` largest eigenvalues and their vectors, or None if the spectrum is too flat for this method."""
    start = torch.randn(len(gram), most + most // 2 + _SPARE, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(start.to(gram))[0]
    for step in range(1, _STEPS + 1):
        product = gram @ basis
        if step % 6 == 0:
            values, turn = torch.linalg.eigh(basis.t() @ product)
            values, turn = values.flip(0)[:most], turn.flip(1)[:, :most]
            vectors = basis @ turn
            if float((product @ turn - vectors * values).norm(dim=0).max()) <= _EXACT * float(values[0]):
                return values, vectors
        basis = torch.linalg.qr(product)[0]
    return None


def principal(gram: Tensor, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Singular values and right singular vectors of ``A``, largest first, from its Gram matrix ``A^T A``.

    Returns the components above rounding errors, at least one and at most ``most``.
    """
    gram = (gram + gram.t()) / 2
    found = None
    if most is not None and len(gram) > _LARGE and most <= len(gram) * _FEW:
        found = _leading(gram, most)
    if found is None:
        squares, vectors = torch.linalg.eigh(gram)
        found = squares.flip(0), vectors.flip(1)
    squares, vectors = found
    count = max(1, int((squares > float(squares[0]) * 1e-13).sum()))
    count = min(count, most or count)
    # A matrix of zeros has one component, which is zero.
    values = squares[:count].clamp_min(0).sqrt()
    values = torch.where(values > 0, values, torch.ones_like(values))
    # The sign of an eigenvector is arbitrary: it is fixed here, so that the bytes do not depend on the library.
    vectors = vectors[:, :count]
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return values, vectors * signs


def settings(rows: int, columns: int) -> list[Setting]:
    """Ranks and bits, from largest to smallest file."""
    # A table is offered at full rank, since weak components take almost no bits.
    even, choices = rows * columns / (rows + columns), _CHOICES
    if is_table(rows, columns):
        even, choices = columns, _OF_TABLES
    pairs = dict.fromkeys((max(1, round(share * even)), bits) for share, bits in choices)
    return [{"rank": rank, "bits": bits} for rank, bits in sorted(pairs, key=lambda pair: -pair[0] * pair[1])]


def read(method: str, setting: Setting) -> tuple[int, float]:
    """Check a setting ``{"rank": 96, "bits": 5}``."""
    return whole(method, setting, "rank", 1), real(method, setting, "bits", 1, 16)


def quantized(parts: Factors, bits: float, evidence: Evidence, coder: Method | None = None) -> Form:
    """Quantize both factors by :class:`Entropy`, each with the evidence that the other implies.

    An error of ``left[i, k]`` costs ``r[i] S[k]``, one of ``right[k]`` costs ``S[k]`` times the column moment. One step
    in units of the loss serves all coefficients, as in transform coding: strong components get more bits than weak
    ones, and ``bits`` is about their mean. The right factor is then refitted to the stored left factor: ``right = (L^T
    diag(r) L)^-1 L^T diag(r) W``, where ``W`` is the product of the exact factors. If the whole left factor is rounded
    to zero, so is the product.

    ``coder`` is a method with a step as its only knob, which replaces :class:`Entropy` for the left factor.
    """
    left, right, values = parts.left, parts.right, parts.values
    step = step_for(parts, bits)
    weights = evidence.rows.clamp_min(float(evidence.rows.max()) * 1e-9).clamp_min(1e-30)
    first = on_grid(left, step, Evidence(weights, torch.diag(values)), coder)
    stored = first.dense().double()
    heavy = stored * weights.double()[:, None]
    normal = heavy.t() @ stored
    if not bool(normal.diagonal().any()):
        # If the left factor is rounded to zeros, no right factor can be fitted, and zeros remain.
        return Entropy().encode(torch.zeros(len(left), right.shape[1]), {"step": 1.0}, Evidence(weights, None))
    # Components rounded to zero stay zero through the ridge.
    normal.diagonal().add_(float(normal.diagonal().max()) * 1e-9)
    refitted = torch.linalg.solve(normal, (heavy.t() @ left.double()) @ right.double()).float()
    implied = Evidence(normal.diagonal().float(), evidence.columns)
    if evidence.columns is not None:
        factored(evidence)
        # Results that depend only on the inputs are shared by all ranks.
        implied.cache.update((key, value) for key, value in evidence.cache.items() if key.startswith("factored"))
    return LowRank(first, on_grid(refitted, step, implied))


def on_grid(factor: Tensor, step: float, evidence: Evidence, coder: Method | None = None) -> Form:
    """A factor rounded by :class:`Entropy` or another coder with the step, or with the finest that its codes allow.

    One step serves all components. If they differ by many orders of magnitude, it is too fine for the strongest.
    """
    coder = coder or Entropy()
    return coder.encode(factor, {"step": max(step, StepUnits(coder.name, factor, evidence).finest)}, evidence)


def step_for(parts: Factors, bits: float) -> float:
    """The step at which the coefficients take about ``bits`` on average.

    In units of the loss the coefficients of component ``k`` have the root mean square ``S[k] / sqrt(rows)`` on the
    left and ``S[k] / sqrt(columns)`` on the right, and a Gaussian takes ``log2(deviation / step) + 2.05`` bits.
    """
    rows, columns = len(parts.left), parts.right.shape[1]
    spread = parts.values.double().log2().mean()
    mean = float(spread) - (rows * math.log2(rows) + columns * math.log2(columns)) / (rows + columns) / 2
    return float(f"{2.0 ** max(-120.0, min(mean + 2.05 - bits, 120.0)):.5g}")
