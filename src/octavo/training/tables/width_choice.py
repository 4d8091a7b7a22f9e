"""Tables that learn how wide their rows should be, by a mixture of widths.

Source: Zhao et al. (2021), arXiv 2006.14827 (AutoDim).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from octavo.errors import RequestError
from octavo.forms import Dense, LowRank
from octavo.training.tables.base import CompactTable
from octavo.training.tables.by_form import DEVIATION


class WidthChoice(CompactTable):
    """``sum_k softmax(logits)_k * E[:, :w_k] P_k``: all widths share the first elements, each has a projection.

    While it does not train, only the width of the largest logit counts.

    Logits train together with the rows. The published search alternates between two halves of the data.

    Parameters
    ----------
    widths
        The candidates, from 1 to the columns.

    Raises
    ------
    RequestError
        If a width is not one of them.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, widths: Sequence[int] = (1, 2, 4, 8, 16)) -> None:
        super().__init__(num_embeddings, embedding_dim)
        if not widths or not 1 <= min(widths) <= max(widths) <= embedding_dim:
            raise RequestError(
                f"width choice: widths {list(widths)} for {embedding_dim} columns; give some from 1 to {embedding_dim}"
            )
        self.widths = tuple(widths)
        self.elements = nn.Parameter(torch.randn(num_embeddings, max(widths)) * DEVIATION)
        self.projections = nn.ParameterList(torch.randn(width, embedding_dim) / width**0.5 for width in widths)
        self.logits = nn.Parameter(torch.zeros(len(widths)))

    def read(self, index: Tensor) -> Tensor:  # noqa: D102
        elements, shares = self.elements[index], self.logits.softmax(0)
        if not self.training:
            # What would be stored.
            shares = torch.nn.functional.one_hot(shares.argmax(), len(self.widths))
        pairs = zip(self.widths, self.projections, strict=True)
        return sum(
            (share * (elements[:, :width] @ after) for share, (width, after) in zip(shares, pairs, strict=True)),
            elements.new_zeros(len(index), self.embedding_dim),
        )

    def form(self) -> LowRank:  # noqa: D102
        return self.of_width(self.widths[int(self.logits.argmax())])

    def of_width(self, width: int) -> LowRank:
        """The rows of one of the candidates, for training on."""
        projection = self.projections[self.widths.index(width)].detach().cpu()
        return LowRank(Dense(self.elements.detach()[:, :width].cpu().clone()), Dense(projection.clone()))
