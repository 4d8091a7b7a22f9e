"""Atomic feature mimicking: principal components of what a layer puts out, rather than of its weights.

With ``mu`` and ``Sigma`` the mean and covariance of the outputs ``y = W x + b`` over the data and ``U_r`` the
eigenvectors of the ``r`` largest eigenvalues of ``Sigma``

    y ~ U_r U_r^T (y - mu) + mu = U_r (U_r^T W x + U_r^T b) + (I - U_r U_r^T) mu

which is two linear layers. What is lost, the sum of the other eigenvalues, is the least of all affine maps of rank
``r``. A table ``D`` of embeddings is a layer whose inputs are its rows' occurrences: ``D[i] ~ U_r U_r^T (D[i] - mu) +
mu`` with rows counted as often as they are met, and ``U_r`` and ``mu`` go into the next layer where that takes the rows
as they are.
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
    """Mean and covariance of vectors that come in batches, without keeping them.

    Parameters
    ----------
    size
        Elements of a vector.
    """

    def __init__(self, size: int) -> None:
        self._count = torch.zeros((), dtype=torch.float64)
        self._sum, self._products = (torch.zeros(*shape, dtype=torch.float64) for shape in ((size,), (size, size)))

    def add(self, vectors: Tensor, counts: Tensor | None = None) -> None:
        """Count vectors (n, size), each once or ``counts`` (n,) times."""
        vectors = vectors.detach().double()
        counts = vectors.new_ones(len(vectors)) if counts is None else counts.to(vectors)
        # Sums are kept where the vectors are.
        self._count = self._count.to(vectors) + counts.sum()
        self._sum = self._sum.to(vectors) + counts @ vectors
        self._products = self._products.to(vectors) + vectors.t() @ (vectors * counts[:, None])

    @property
    def mean(self) -> Tensor:
        """(size,)."""
        return self._sum / self._count.clamp_min(1e-300)

    @property
    def covariance(self) -> Tensor:
        """(size, size)."""
        return self._products / self._count.clamp_min(1e-300) - torch.outer(self.mean, self.mean)

    def principal(self, rank: int) -> Tensor:
        """``U_r``: (size, rank) orthonormal directions, of largest variance first; fewer if others have none."""
        size = len(self._sum)
        require_finite(self._products)
        if not 0 < rank <= size:
            raise RequestError(f"afm: outputs of {size} elements have 1 to {size} principal components, not {rank}")
        return factors.principal(self.covariance, rank)[1]


@dataclass(frozen=True)
class Mimicked:
    """Two linear layers in the place of one: ``outer (inner x + inner_bias) + outer_bias``.

    Parameters
    ----------
    inner, inner_bias
        (rank, columns) and (rank,): ``U_r^T W`` and ``U_r^T b``; of a table (items, rank) codes, transposed, less their
        mean.
    outer, outer_bias
        (rows, rank) with orthonormal columns, and (rows,): ``U_r`` and ``(I - U_r U_r^T) mu``; of a table ``mu``.
    """

    inner: Tensor
    inner_bias: Tensor
    outer: Tensor
    outer_bias: Tensor


def mimicked(weight: Tensor, bias: Tensor, outputs: OutputMoments, rank: int) -> Mimicked:
    """A linear layer, ``weight`` (rows, columns) and ``bias`` (rows,), as two of that rank; see the module's page."""
    basis = outputs.principal(rank)
    rest = outputs.mean - basis @ (basis.t() @ outputs.mean)
    parts = (basis.t() @ weight.double(), basis.t() @ bias.double(), basis, rest)
    return Mimicked(*(part.float() for part in parts))


def mimicked_table(table: Tensor, counts: Tensor, rank: int) -> Mimicked:
    """A table (items, width) of embeddings whose row ``i`` is met ``counts[i]`` times, as codes and a shared basis."""
    rows = OutputMoments(table.shape[1])
    # A table that was never looked up has no occurrences: every row then counts alike.
    rows.add(table, counts if bool((counts > 0).any()) else None)
    basis = rows.principal(rank)
    codes = basis.t() @ (table.double() - rows.mean).t()
    return Mimicked(*(part.float() for part in (codes, torch.zeros(len(codes)), basis, rows.mean)))


def folded(weight: Tensor, bias: Tensor, tables: Sequence[Mimicked]) -> tuple[Tensor, Tensor]:
    """The first layer over the rows of several tables, concatenated, as one over their codes.

    ``weight`` (rows, sum of widths) becomes ``[W_1 U_1, W_2 U_2, ...]`` and ``bias`` takes ``sum_f W_f mu_f``: the
    bases then cost nothing. Only where nothing else reads the rows. Both keep their precision.
    """
    widths = [len(table.outer) for table in tables]
    if not tables or sum(widths) != weight.shape[1]:
        raise RequestError(f"afm: a layer of {weight.shape[1]} inputs does not take rows of {widths} elements")
    pieces = list(zip(weight.float().split(widths, 1), tables, strict=True))
    moved = torch.stack([piece @ table.outer_bias for piece, table in pieces]).sum(0)
    joined = torch.cat([piece @ table.outer for piece, table in pieces], 1)
    return joined.to(weight), (bias + moved).to(bias)


@method("afm", family="factorize", preset="best", source="Yu et al. (2024, arXiv 2405.18146)")
@dataclass(frozen=True)
class AFM(Method):
    """``W ~ U_r U_r^T W``: ``U_r`` spans the directions in which the outputs vary most, all outputs alike.

    ``W`` is (rows, columns), ``left = U_r S^(1/2)``, ``right = S^(-1/2) U_r^T W`` with the eigenvectors ``U_r`` (rows,
    rank) and values ``S^2`` of the outputs' moment ``W C W^T``, where ``C`` is that of the inputs. How the scale ``S``
    is shared between the two is what lets one step quantize both; which outputs matter more to the model (``r``) only
    tells how finely. The evidence has no mean to take off, so a constant output takes a component of its own; biases
    are fitted later, like those of every method.
    """

    takes = ("rank", "bits")

    def accepts(self, site: Site) -> bool:  # noqa: D102
        return site.kind in ("linear", "head")

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """Ranks from that at which the factors have as many elements as the matrix, times bits a coefficient."""
        return factors.settings(*weight.shape)

    def encode(self, weight: Tensor, setting: Setting, evidence: Evidence) -> Form:  # noqa: D102
        return next(self.encode_all(weight, [setting], evidence))

    def encode_all(self, weight: Tensor, settings: Iterable[Setting], evidence: Evidence) -> Iterator[Form]:
        """All settings share the decomposition."""
        require_finite(evidence.rows)
        parts = factors.whitened(weight, right=evidence.columns)
        # The step is chosen for outputs of mean weight 1, which those of the decomposition have.
        alike = replace(evidence, rows=evidence.rows / evidence.rows.mean().clamp_min(1e-30), terms=())
        for setting in settings:
            rank, bits = factors.read(self.name, setting)
            yield factors.quantized(parts.first(rank), bits, alike)
