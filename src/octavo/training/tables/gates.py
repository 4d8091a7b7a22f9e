"""Tables whose columns are gated for groups of rows of similar frequency, so that rare rows may become narrower.

Source: AutoSrh (Kong et al., 2022). Its L1 penalty of the gates, 1e-5, is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from octavo.errors import RequestError
from octavo.forms import Dense, RowBlocks, Trimmed
from octavo.training.tables.base import CompactTable
from octavo.training.tables.by_form import DEVIATION, ranked

GROUPS = 6


class GatedGroups(CompactTable):
    """``row = gates[group] * elements`` with trained gates (groups, columns); groups hold equally many rows.

    Parameters
    ----------
    counts
        (rows,) how often each row is used, by which rows are grouped.
    groups
        How many; the most frequent rows come first.

    Raises
    ------
    RequestError
        If there are fewer rows than groups, or more than 256 groups.
    """

    def __init__(self, counts: Tensor, embedding_dim: int, groups: int = GROUPS) -> None:
        super().__init__(len(counts), embedding_dim)
        if not 1 <= groups <= len(counts):
            raise RequestError(f"gates: {groups} groups of {len(counts)} rows; give 1 to {len(counts)}")
        ends = [round(len(counts) * k / groups) for k in range(1, groups)]
        self.register_buffer("member", ranked(counts, ends))
        self.elements = nn.Parameter(torch.randn(len(counts), embedding_dim) * DEVIATION)
        self.gates = nn.Parameter(torch.ones(groups, embedding_dim))

    def read(self, index: Tensor) -> Tensor:  # noqa: D102
        return self.elements[index] * self.gates[self.get_buffer("member")[index].long()]

    def form(self) -> RowBlocks:  # noqa: D102
        return self.kept(self.num_embeddings * self.embedding_dim)

    @torch.no_grad()
    def kept(self, count: int) -> RowBlocks:
        """At most ``count`` elements in the columns of largest gates, but one column of every group.

        Elements are multiplied by their gates, for training on.
        """
        member, rows = self.get_buffer("member").cpu(), self.weight.cpu()
        sizes, gates = member.long().bincount(), self.gates.detach().abs().cpu()
        # A column of a group costs as many elements as the group has rows. The best of each group come first.
        first = torch.zeros_like(gates).scatter_(1, gates.argmax(1, keepdim=True), torch.inf)
        order = (gates + first).flatten().argsort(descending=True, stable=True)
        costs = sizes[:, None].expand_as(gates).flatten()[order].cumsum(0)
        chosen = torch.zeros(gates.numel(), dtype=torch.bool).index_fill_(0, order[costs <= count], True)
        chosen = chosen.view(gates.shape) | (first > 0)
        blocks = []
        for number, columns in enumerate(chosen):
            own = rows[member == number][:, columns]
            blocks.append(Trimmed(Dense(own), torch.ones(len(own), dtype=torch.bool), columns))
        return RowBlocks(member, tuple(blocks))
