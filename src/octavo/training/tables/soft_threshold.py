"""Tables pruned by thresholds that are learned.

Source: Liu et al. (2021), arXiv 2101.07577 (PEP).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from octavo.errors import RequestError
from octavo.forms import Dense, Sparse
from octavo.training.tables.base import CompactTable
from octavo.training.tables.by_form import DEVIATION

#: Thresholds start at ``sigmoid(-8)``, where nearly nothing is pruned.
_FIRST = -8.0


class SoftThreshold(CompactTable):
    """``sign(v) * max(|v| - sigmoid(s), 0)`` with trained elements ``v`` and a trained ``s`` for every row.

    :meth:`kept` gives the elements that stand highest above their thresholds, for training on with a fixed mask.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.elements = nn.Parameter(torch.randn(num_embeddings, embedding_dim) * DEVIATION)
        self.thresholds = nn.Parameter(torch.full((num_embeddings, 1), _FIRST))

    def read(self, index: Tensor) -> Tensor:  # noqa: D102
        elements = self.elements[index]
        return elements.sign() * (elements.abs() - self.thresholds[index].sigmoid()).relu()

    def form(self) -> Sparse:  # noqa: D102
        return self.kept(int((self._rows() != 0).sum()))

    def kept(self, count: int) -> Sparse:
        """The ``count`` elements of largest magnitude beyond their thresholds.

        Raises
        ------
        RequestError
            If there are not as many elements.
        """
        rows = self._rows()
        if not 0 <= count <= rows.numel():
            raise RequestError(f"soft threshold: {count} of {rows.numel()} elements cannot be kept; give fewer")
        chosen = rows.abs().flatten().topk(count).indices
        mask = torch.zeros(rows.numel(), dtype=torch.bool).index_fill_(0, chosen, True).view(rows.shape)
        return Sparse(mask, Dense(rows[mask][None]))

    @torch.no_grad()
    def _rows(self) -> Tensor:
        return self.weight.cpu()
