"""Differentiable product quantization: rows choose one vector of each codebook, and learn which.

Sources: Chen, Li and Sun (2020), arXiv 1908.09756 (DPQ); Kang et al. (2020), arXiv 2002.08530 (MGQE), which gives rare
rows fewer vectors to choose from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from octavo.errors import RequestError
from octavo.forms import Vectors
from octavo.training.tables.base import CompactTable
from octavo.training.tables.by_form import DEVIATION, ranked
from octavo.training.tables.groups import RowGroups

#: Distances held at once while codes are chosen.
_AT_ONCE = 1 << 22


class ProductCodes(CompactTable):
    """A row is ``books`` vectors next to each other, each the one of its codebook whose key is nearest to a query.

    The forward pass takes the nearest; gradients reach queries and keys through the softmax of negative squared
    distances. Queries and keys are only needed for training: codes and vectors are stored.

    Parameters
    ----------
    books
        Codebooks; they divide the columns.
    entries
        Vectors of each.

    Raises
    ------
    RequestError
        If the books do not divide the columns, or there are more entries than rows that could choose them.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, books: int, entries: int = 256) -> None:
        super().__init__(num_embeddings, embedding_dim)
        if books < 1 or embedding_dim % books:
            raise RequestError(
                f"product codes: {books} books do not divide {embedding_dim} columns; give a divisor of them"
            )
        if not 1 <= entries <= num_embeddings:
            raise RequestError(
                f"product codes: {entries} entries for {num_embeddings} rows; give 1 to {num_embeddings}, as more than "
                "there are rows would only cost bytes"
            )
        width = embedding_dim // books
        self.queries = nn.Parameter(torch.randn(num_embeddings, books, width))
        self.keys = nn.Parameter(torch.randn(books, entries, width))
        self.values = nn.Parameter(torch.randn(books, entries, width) * DEVIATION)

    def read(self, index: Tensor) -> Tensor:  # noqa: D102
        far = self._distances(index)
        soft = (-far).softmax(2)
        hard = torch.zeros_like(soft).scatter_(2, far.argmin(2, keepdim=True), 1.0)
        chosen = soft + (hard - soft).detach()
        return torch.einsum("nbe,bew->nbw", chosen, self.values).flatten(1)

    @torch.no_grad()
    def form(self) -> Vectors:  # noqa: D102
        books, entries, _ = self.values.shape
        some = torch.arange(self.num_embeddings, device=self.values.device).split(max(1, _AT_ONCE // (books * entries)))
        codes = torch.cat([self._distances(index).argmin(2) for index in some])
        kind = torch.uint8 if entries <= 256 else torch.int32
        return Vectors(codes[None].to(kind).cpu(), self.values[None].half().cpu(), self.embedding_dim)

    def _distances(self, index: Tensor) -> Tensor:
        """Squared distances of queries from keys (n, books, entries)."""
        return torch.cdist(self.queries[index].transpose(0, 1), self.keys).square().transpose(0, 1)


def codes_by_frequency(
    counts: Tensor, columns: int, books: int, entries: Sequence[int] = (256, 64), share: float = 0.1
) -> RowGroups:
    """Product codes with ``entries[0]`` vectors for the most frequent rows, and ``entries[1]`` for the others (MGQE).

    Parameters
    ----------
    counts
        (rows,) how often each row is used.
    share
        Of the rows, the most frequent.
    """
    member = ranked(counts, [max(1, round(share * len(counts)))])
    sizes = member.long().bincount(minlength=2).tolist()
    return RowGroups(member, [ProductCodes(n, columns, books, min(k, n)) for n, k in zip(sizes, entries, strict=True)])
