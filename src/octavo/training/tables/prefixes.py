"""Tables that train for every width at once, so that rows and widths can be searched without training.

Source: Lyu et al. (2022), arXiv 2208.04482 (OptEmbed).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from octavo.errors import RequestError
from octavo.forms import Dense, Trimmed
from octavo.training.tables.base import CompactTable
from octavo.training.tables.by_form import DEVIATION


class Prefixes(CompactTable):
    """Rows of which the first ``width`` elements count, another random number at every step; and rows that may vanish.

    A row counts if its sum of magnitudes exceeds a trained threshold. The gradient passes through that decision as if
    it was a sigmoid of the difference.

    Attributes
    ----------
    width
        Elements that count when it does not train.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.elements = nn.Parameter(torch.randn(num_embeddings, embedding_dim) * DEVIATION)
        self.threshold = nn.Parameter(torch.zeros(()))
        self.width = embedding_dim

    def read(self, index: Tensor) -> Tensor:  # noqa: D102
        elements = self.elements[index]
        width = int(torch.randint(1, self.embedding_dim + 1, ())) if self.training else self.width
        above = elements.abs().sum(1, keepdim=True) - self.threshold
        soft = above.sigmoid()
        rows = elements * (soft + ((above > 0).float() - soft).detach())
        return torch.nn.functional.pad(rows[:, :width], (0, self.embedding_dim - width))

    def form(self) -> Trimmed:  # noqa: D102
        count = int((self._sizes() > self.threshold.detach().cpu()).sum())
        return self.kept(max(1, count), self.width)

    def kept(self, rows: int, width: int) -> Trimmed:
        """The ``rows`` rows of largest magnitude, with their first ``width`` elements, for training on.

        Raises
        ------
        RequestError
            If the table is not that large.
        """
        if not (1 <= rows <= self.num_embeddings and 1 <= width <= self.embedding_dim):
            raise RequestError(f"prefixes: {rows} rows of {width} elements are not in {self.extra_repr()}; give fewer")
        chosen = torch.zeros(self.num_embeddings, dtype=torch.bool)
        chosen[self._sizes().topk(rows).indices] = True
        inner = self.elements.detach().cpu()[chosen, :width].clone()
        return Trimmed(Dense(inner), chosen, torch.arange(self.embedding_dim) < width)

    def _sizes(self) -> Tensor:
        return self.elements.detach().abs().sum(1).cpu()
