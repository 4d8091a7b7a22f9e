"""Matrix product operators: a matrix as a chain of small cores, found by successive truncated SVDs."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.calibration.evidence import Evidence, require_finite
from octavo.errors import RequestError
from octavo.forms import Dense, Form, TensorTrain
from octavo.forms.tensor_train import MOST_CORES, full_ranks
from octavo.methods.base import Method, Setting, method
from octavo.methods.factorize.factors import Factors, whitened
from octavo.methods.knobs import real, whole
from octavo.methods.quantize.entropy import Entropy
from octavo.sources.sites import Site

#: Number of cores, elements of the cores as a share of those of the matrix, and bits per coefficient.
_CHOICES: tuple[tuple[int, float, float], ...] = (
    (2, 1.0, 6), (2, 1.0, 4), (2, 1.0, 3), (3, 1.0, 3), (2, 0.5, 4), (2, 0.5, 3), (3, 0.5, 3), (2, 0.5, 2.5),
    (2, 0.25, 3), (3, 0.25, 3), (2, 0.25, 2), (2, 0.125, 2), (3, 0.125, 2),
)  # fmt: skip
#: Above this smaller side, an SVD that needs at most half of the components uses a random subspace. It has half as many
#: additional dimensions and this many products, and discards 1% more than an exact SVD.
_LARGE, _PRODUCTS = 1024, 5


def modes(size: int, sites: int) -> tuple[int, ...]:
    """Rising numbers of least sum whose product is at least ``size``; among these, with the least product.

    At a given bond dimension the cost of a chain is the sum of its modes. So balanced modes with slight padding are
    better than exact but uneven ones: 7 is 2 x 4 with one row of zeros, not 1 x 7; 384 is 16 x 24, and 6 x 8 x 8.
    """
    if size < 1 or not 1 <= sites <= MOST_CORES:
        raise RequestError(
            f"mpo: {size} cannot be written in {sites} modes; give a positive size and 1 to {MOST_CORES} modes"
        )

    def search(rest: int, count: int, low: int) -> tuple[int, int, tuple[int, ...]]:
        if count == 1:
            last = max(rest, low)
            return last, last, (last,)
        # Modes rise, so the first is at most the root, rounded up.
        found = []
        for first in range(low, max(low, math.ceil(rest ** (1 / count))) + 1):
            total, product, others = search(-(-rest // first), count - 1, first)
            found.append((first + total, first * product, (first, *others)))
        return min(found)

    return search(size, sites, 1)[2]


@dataclass(frozen=True)
class Chain:
    """Cores of a truncated decomposition, before quantization.

    Parameters
    ----------
    cores
        float64, of shape (chi_(k-1), o_k * i_k, chi_k): the cores of the weighted matrix divided by ``unit``. All
        except the last are orthonormal, ``sum_(a, n) G[a, n, b] G[a, n, c] = 1 if b == c else 0``; the last carries the
        singular values.
    values
        The kept singular values of every bond, in falling order.
    weights
        For every site (o_k * i_k,): the factor of the matrix at these digits.
    unit
        The largest magnitude of the weighted matrix.
    lost
        The sum of all discarded squared singular values: the squared weighted error without padding, and an upper bound
        of it with padding.
    """

    cores: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    unit: float
    lost: float
    row_modes: tuple[int, ...]
    column_modes: tuple[int, ...]
    shape: tuple[int, int]

    def dense(self) -> TensorTrain:
        """The chain with the singular values of each bond split evenly between its cores, best for training."""
        ones = torch.ones(1, dtype=torch.float64)
        bonds = [ones, *(value.sqrt() for value in self.values), ones]
        share = self.unit ** (1 / len(self.cores))
        return self._form(
            Dense((core / scale[:, None] / before[:, None, None] * after * share).flatten(0, 1).float())
            for core, scale, before, after in zip(self.cores, self.weights, bonds, bonds[1:], strict=False)
        )

    def quantized(self, bits: float) -> TensorTrain:
        """Quantize every core by :class:`Entropy` with one step in units of the error, at about ``bits`` on average.

        An error in column ``b`` of a core costs ``S[b]^2``, since the cores before and after it are orthonormal. The
        next core compensates the rounding error of a core: it is multiplied by ``(Q^T Q)^-1 Q^T U``, ``Q`` being the
        core ``U`` as stored.
        """
        step = self._step(bits)
        stored: list[Form] = []
        taken = torch.ones(1, 1, dtype=torch.float64)
        for exact, values, scale in zip(self.cores, self.values, self.weights, strict=False):
            core = torch.einsum("ab,bnc->anc", taken, exact).flatten(0, 1)
            weights = scale.repeat(len(exact))
            evidence = Evidence(weights.square().float(), torch.diag(values.square()).float())
            stored.append(Entropy().encode((core / weights[:, None]).float(), {"step": step}, evidence))
            basis = stored[-1].dense().double() * weights[:, None]
            normal = basis.t() @ basis
            # Components rounded to zero stay zero through the ridge.
            normal.diagonal().add_(float(normal.diagonal().max().clamp_min(1e-200)) * 1e-9)
            taken = torch.linalg.solve(normal, basis.t() @ core)
        # The last core is a single column, where row steps would cost as much as the codes: it has one step.
        last = torch.einsum("ab,bnc->anc", taken, self.cores[-1]) / self.weights[-1][:, None]
        mean = float(self.weights[-1].square().mean().sqrt())
        flat = (last.flatten(0, 1) * self.unit).float()
        plain = Evidence(torch.ones(len(flat)), None)
        stored.append(Entropy().encode(flat, {"step": max(step * self.unit / mean, 1e-30)}, plain))
        return self._form(stored)

    def _step(self, bits: float) -> float:
        """The step at which coefficients take about ``bits``: a Gaussian takes ``log2(deviation / step) + 2.05``."""
        squares = [
            value.square() / len(core.flatten(0, 1)) for core, value in zip(self.cores, self.values, strict=False)
        ]
        squares.append(self.cores[-1].square().mean((1, 2)))
        counts = [core.numel() for core in self.cores]
        spread = sum(
            float(square.clamp_min(1e-18).log2().mean()) / 2 * count
            for square, count in zip(squares, counts, strict=True)
        )
        return max(2.0 ** (spread / sum(counts) + 2.05 - bits), 1e-30)

    def _form(self, cores: Iterable[Form]) -> TensorTrain:
        return TensorTrain(tuple(cores), self.row_modes, self.column_modes, *self.shape)


def decompose(
    weight: Tensor,
    row_modes: Sequence[int],
    column_modes: Sequence[int],
    chi: int | None = None,
    *,
    evidence: Evidence | None = None,
) -> Chain:
    """Truncated SVDs from the first site to the last (TT-SVD; Oseledets, 2011).

    Rows and columns are padded with zeros to the products of their modes, written in mixed radix, and interleaved to
    sites of ``o_k * i_k``. Each SVD keeps ``U`` and passes ``S V^T`` on, so the total squared error is the sum of all
    discarded squared singular values.

    Parameters
    ----------
    weight
        (rows, columns).
    chi
        The largest number of singular values kept per bond; None for all.
    evidence
        Weights errors, as far as the weights are a product over the digits of rows and columns, since only these can be
        folded into the cores. Token counts fall with the token number, so much of them is such a product.

    Raises
    ------
    RequestError
        If the modes do not fit the matrix.
    """
    (rows, columns), sites = weight.shape, len(row_modes)
    padded = math.prod(row_modes), math.prod(column_modes)
    if sites == 0 or len(column_modes) != sites or padded[0] < rows or padded[1] < columns:
        raise RequestError(
            f"mpo: modes {tuple(row_modes)} x {tuple(column_modes)} do not fit a matrix of {rows} x {columns}; give as "
            "many modes for rows as for columns, with products at least that large"
        )
    scales = _scales(evidence, row_modes, column_modes)
    matrix = torch.nn.functional.pad(weight.float(), (0, padded[1] - columns, 0, padded[0] - rows))
    # (o_1 .. o_N, i_1 .. i_N) to (o_1, i_1, .. o_N, i_N).
    order = [axis for k in range(sites) for axis in (k, sites + k)]
    rest = matrix.reshape(*row_modes, *column_modes).permute(order).reshape([len(scale) for scale in scales])
    for k, scale in enumerate(scales):
        rest = rest * scale.float().reshape([-1 if axis == k else 1 for axis in range(sites)])
    unit = float(rest.abs().max()) or 1.0
    # Scaled so that no square overflows.
    rest = (rest / unit).reshape(1, -1).double()
    cores, bonds, lost = [], [], 0.0
    for scale in scales[:-1]:
        rest = rest.reshape(len(rest) * len(scale), -1)
        parts = _leading(rest, chi)
        tails = float(rest.square().sum()) - parts.values.double().square().cumsum(0)
        parts = parts.first(min(len(tails), int((tails > 0).sum()) + 1))
        values = parts.values.double()
        lost += max(0.0, float(tails[len(values) - 1]))
        basis = parts.left.double() / values.sqrt()
        cores.append(basis.unflatten(0, (-1, len(scale))))
        bonds.append(values)
        # U^T A = S V^T, and zero where A is zero.
        rest = basis.t() @ rest
    cores.append(rest.reshape(len(rest), -1, 1))
    return Chain(
        tuple(cores), tuple(bonds), scales, unit, lost * unit**2, tuple(row_modes), tuple(column_modes), (rows, columns)
    )


def _leading(matrix: Tensor, most: int | None) -> Factors:
    """Truncated SVD; a large matrix uses the span of its products with random vectors, which is nearly as good."""
    side = min(matrix.shape)
    if most is None or side <= _LARGE or most > side / 2:
        return whitened(matrix, most=most)
    small = matrix.float()
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(matrix.shape[1], min(most * 3 // 2 + 8, side), generator=generator).to(small)
    for turn in range(_PRODUCTS):
        basis = torch.linalg.qr((small if turn % 2 == 0 else small.t()) @ basis)[0]
    parts = whitened(basis.t() @ small, most=most)
    return Factors(basis @ parts.left, parts.right, parts.values)


def _scales(evidence: Evidence | None, row_modes: Sequence[int], column_modes: Sequence[int]) -> tuple[Tensor, ...]:
    """Square roots of the weights of every site's digits (o_k * i_k,)."""
    across, along = ([torch.ones(mode, dtype=torch.float64) for mode in modes] for modes in (row_modes, column_modes))
    if evidence is not None:
        for moment in (evidence.rows, evidence.columns):
            if moment is not None:
                require_finite(moment)
        across = _separable(evidence.rows, row_modes)
        along = along if evidence.columns is None else _separable(evidence.columns.diagonal(), column_modes)
    return tuple(torch.outer(o, i).flatten().sqrt() for o, i in zip(across, along, strict=True))


def _separable(weights: Tensor, modes: Sequence[int]) -> list[Tensor]:
    """Factors of every digit whose product approximates ``weights``, by means of logarithms."""
    weights = weights.double()
    logs = weights.clamp_min(float(weights.max()) * 1e-9).clamp_min(1e-30).log()
    index, factors = torch.arange(len(logs)), []
    for k, mode in enumerate(modes):
        digit = index // math.prod(modes[k + 1 :]) % mode
        sums, counts = digit.bincount(logs - logs.mean(), mode), digit.bincount(minlength=mode)
        factors.append((sums / counts.clamp_min(1) + logs.mean() / len(modes)).exp())
    return factors


@method("mpo", family="factorize", preset="best", source="CompactifAI (Tomut et al., 2024, arXiv 2401.14109)")
@dataclass(frozen=True)
class MPO(Method):
    """``W[(o_1 .. o_N), (i_1 .. i_N)] = G_1[o_1, i_1] G_2[o_2, i_2] ... G_N[o_N, i_N]`` by TT-SVD, quantized.

    ``W`` is (rows, columns), with ``prod o_k`` at least rows and ``prod i_k`` at least columns; the core ``G_k`` is
    (chi_(k-1), o_k, i_k, chi_k) and costs as many coefficients. With two sites this is a sum of ``chi`` Kronecker
    products. It need not beat an SVD of the same size: for weights without structure both keep the same.

    Evidence is only used as far as it is a product over digits (:func:`decompose`).
    """

    takes = ("sites", "chi", "bits")

    def accepts(self, site: Site) -> bool:
        """Matrices only; convolutions are tensorized differently."""
        return site.kind not in ("convolution", "vector")

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """Two and three cores, bond dimensions by the number of elements, and bits per coefficient."""
        sized = {}
        for sites, share, bits in _CHOICES:
            split = modes(weight.shape[0], sites), modes(weight.shape[1], sites)[::-1]
            smaller = min(math.prod(split[0][:1] + split[1][:1]), split[0][-1] * split[1][-1])
            if share > 0.5 and smaller > _LARGE:
                continue
            chi = bond(*split, share * weight.numel())
            sized[sites, chi, bits] = elements(*split, chi) * bits
        return [{"sites": n, "chi": chi, "bits": bits} for n, chi, bits in sorted(sized, key=lambda key: -sized[key])]

    def encode(self, weight: Tensor, setting: Setting, evidence: Evidence) -> Form:  # noqa: D102
        return next(self.encode_all(weight, [setting], evidence))

    def encode_all(self, weight: Tensor, settings: Iterable[Setting], evidence: Evidence) -> Iterator[Form]:
        """Settings with the same number of cores and bond dimension share the decomposition."""
        known: dict[tuple[int, int], Chain] = {}
        for setting in settings:
            sites = whole(self.name, setting, "sites", 2, MOST_CORES)
            chi, bits = whole(self.name, setting, "chi", 1), real(self.name, setting, "bits", 1, 16)
            if (sites, chi) not in known:
                split = modes(weight.shape[0], sites), modes(weight.shape[1], sites)[::-1]
                known[sites, chi] = decompose(weight, *split, chi, evidence=evidence)
            yield known[sites, chi].quantized(bits)


def elements(row_modes: Sequence[int], column_modes: Sequence[int], chi: int) -> int:
    """Coefficients of all cores at bonds of at most ``chi``: ``sum_k chi_(k-1) o_k i_k chi_k``."""
    ranks = [min(chi, most) for most in full_ranks(row_modes, column_modes)]
    return sum(a * o * i * b for a, o, i, b in zip(ranks, row_modes, column_modes, ranks[1:], strict=False))


def bond(row_modes: Sequence[int], column_modes: Sequence[int], budget: float) -> int:
    """The largest bond dimension whose cores have at most ``budget`` coefficients; at least 1."""
    most = max(full_ranks(row_modes, column_modes))
    fits = bisect.bisect_right(range(1, most + 1), budget, key=lambda chi: elements(row_modes, column_modes, chi))
    return max(1, fits)
