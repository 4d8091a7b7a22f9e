"""Atomic feature mimicking: principal components of a layer's outputs instead of its weights.

With ``mu`` and ``Sigma`` the mean and covariance of the outputs ``y = W x + b`` over the data and ``U_r`` the
eigenvectors of the ``r`` largest eigenvalues of ``Sigma``

    y ~ U_r U_r^T (y - mu) + mu = U_r (U_r^T W x + U_r^T b) + (I - U_r U_r^T) mu

which is two linear layers. The loss, the sum of the other eigenvalues, is minimal among all affine maps of rank ``r``.
An embedding table ``D`` is a layer whose inputs are the occurrences of its rows: ``D[i] ~ U_r U_r^T (D[i] - mu) + mu``
with rows weighted by frequency. ``U_r`` and ``mu`` are merged into the next layer if that reads the rows directly.
:class:`octavo.methods.factorize.mimicking.Mimicking` splits a whole module.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from octavo.calibration.evidence import Evidence, require_finite
from octavo.errors import RequestError
from octavo.forms import Form
from octavo.methods.base import Method, Setting, method
from octavo.methods.factorize import factors
from octavo.sources.sites import Site


class OutputMoments:
    """Running mean and covariance of batches of vectors.

    Parameters
    ----------
    size
        Number of elements of a vector.
    """

    def __init__(self, size: int) -> None:
        self._count = torch.zeros((), dtype=torch.float64)
        self._sum, self._products = (torch.zeros(*shape, dtype=torch.float64) for shape in ((size,), (size, size)))

    def add(self, vectors: Tensor, counts: Tensor | None = None) -> None:
        """Add vectors (n, size), each once or ``counts`` (n,) times."""
        vectors = vectors.detach().double()
        counts = vectors.new_ones(len(vectors)) if counts is None else counts.to(vectors)
        # Sums are kept on the device of the vectors.
        self._count = self._count.to(vectors) + counts.sum()
        self._sum = self._sum.to(vectors) + counts @ vectors
        self._products = self._products.to(vectors) + vectors.t() @ (vectors * counts[:, None])

    @property
    def count(self) -> float:
        """The number of vectors."""
        return float(self._count)

    @property
    def mean(self) -> Tensor:
        """The mean, (size,)."""
        return self._sum / self._count.clamp_min(1e-300)

    @property
    def covariance(self) -> Tensor:
        """The covariance, (size, size)."""
        return self._products / self._count.clamp_min(1e-300) - torch.outer(self.mean, self.mean)

    def principal(self, rank: int) -> Tensor:
        """``U_r``: (size, rank) orthonormal directions by falling variance; fewer if the others have none."""
        size = len(self._sum)
        require_finite(self._products)
        if not 0 < rank <= size:
            raise RequestError(
                f"afm: rank {rank} is not possible for outputs of {size} elements; choose from 1 to {size}"
            )
        return factors.principal(self.covariance, rank)[1]


@dataclass(frozen=True)
class Mimicked:
    """Two linear layers that replace one: ``outer (inner x + inner_bias) + outer_bias``.

    Parameters
    ----------
    inner, inner_bias
        (rank, columns) and (rank,): ``U_r^T W`` and ``U_r^T b``; for a table the transposed codes of (items, rank),
        minus their mean.
    outer, outer_bias
        (rows, rank) with orthonormal columns, and (rows,): ``U_r`` and ``(I - U_r U_r^T) mu``; for a table ``mu``.
    """

    inner: Tensor
    inner_bias: Tensor
    outer: Tensor
    outer_bias: Tensor


def mimicked(weight: Tensor, bias: Tensor, outputs: OutputMoments, rank: int) -> Mimicked:
    """Split a linear layer, ``weight`` (rows, columns) and ``bias`` (rows,), into two; see the module's docstring."""
    basis = outputs.principal(rank)
    rest = outputs.mean - basis @ (basis.t() @ outputs.mean)
    parts = (basis.t() @ weight.double(), basis.t() @ bias.double(), basis, rest)
    return Mimicked(*(part.float() for part in parts))


def mimicked_table(table: Tensor, counts: Tensor, rank: int) -> Mimicked:
    """Split an embedding table (items, width) into codes and a basis; ``counts[i]`` is how often row ``i`` is read."""
    rows = OutputMoments(table.shape[1])
    # If the table was never read, all rows count equally.
    rows.add(table, counts if bool((counts > 0).any()) else None)
    basis = rows.principal(rank)
    codes = basis.t() @ (table.double() - rows.mean).t()
    return Mimicked(*(part.float() for part in (codes, torch.zeros(len(codes)), basis, rows.mean)))


def folded(weight: Tensor, bias: Tensor, tables: Sequence[Mimicked]) -> tuple[Tensor, Tensor]:
    """Convert the layer that reads the concatenated rows of several tables to read their codes.

    ``weight`` (rows, sum of widths) becomes ``[W_1 U_1, W_2 U_2, ...]`` and ``bias`` takes ``sum_f W_f mu_f``: the
    bases then cost nothing. This requires that nothing else reads the rows. Both keep their precision.
    """
    widths = [len(table.outer) for table in tables]
    if not tables or sum(widths) != weight.shape[1]:
        raise RequestError(f"afm: a layer of {weight.shape[1]} inputs does not match rows of {widths} elements")
    pieces = list(zip(weight.float().split(widths, 1), tables, strict=True))
    moved = torch.stack([piece @ table.outer_bias for piece, table in pieces]).sum(0)
    joined = torch.cat([piece @ table.outer for piece, table in pieces], 1)
    return joined.to(weight), (bias + moved).to(bias)


@method("afm", family="factorize", preset="best", source="Yu et al. (2024, arXiv 2405.18146)")
@dataclass(frozen=True)
class AFM(Method):
    """``W ~ U_r U_r^T W``: ``U_r`` spans the directions of largest output variance, with equal output weights.

    ``W`` is (rows, columns), ``left = U_r S^(1/2)``, ``right = S^(-1/2) U_r^T W`` with the eigenvectors ``U_r`` (rows,
    rank) and values ``S^2`` of the outputs' moment ``W C W^T``, where ``C`` is that of the inputs. The scale ``S`` is
    shared between the two so that one step can quantize both; the importance ``r`` of the outputs only determines how
    finely. The evidence has no mean to subtract, so a constant output takes one component. Biases are fitted later, as
    for every method.
    """

    takes = ("rank", "bits")

    def accepts(self, site: Site) -> bool:  # noqa: D102
        return site.kind in ("linear", "head")

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """Ranks, from the one at which the factors are as large as the matrix, times bits per coefficient."""
        return factors.settings(*weight.shape)

    def encode(self, weight: Tensor, setting: Setting, evidence: Evidence) -> Form:  # noqa: D102
        return next(self.encode_all(weight, [setting], evidence))

    def encode_all(self, weight: Tensor, settings: Iterable[Setting], evidence: Evidence) -> Iterator[Form]:
        """All settings share the decomposition."""
        require_finite(evidence.rows)
        parts = factors.whitened(weight, right=evidence.columns)
        # The step is chosen for outputs of mean weight 1, as in the decomposition.
        alike = replace(evidence, rows=evidence.rows / evidence.rows.mean().clamp_min(1e-30), terms=())
        for setting in settings:
            rank, bits = factors.read(self.name, setting)
            yield factors.quantized(parts.first(rank), bits, alike)
