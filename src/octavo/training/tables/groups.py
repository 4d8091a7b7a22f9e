"""A table whose rows are divided among several tables, such as frequent and rare ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from octavo.errors import RequestError
from octavo.forms import RowBlocks
from octavo.forms.rowblocks import MOST_BLOCKS
from octavo.training.tables.base import CompactTable


class RowGroups(CompactTable):
    """Row ``i`` is the next unread row of table ``member[i]``, as in :class:`octavo.forms.RowBlocks`.

    Parameters
    ----------
    member
        (rows,) uint8.
    tables
        Of one width, with as many rows as members.

    Raises
    ------
    RequestError
        If members and tables do not fit, or there are more than 256 tables.
    """

    def __init__(self, member: Tensor, tables: Sequence[CompactTable]) -> None:
        super().__init__(len(member), tables[0].embedding_dim)
        if len(tables) > MOST_BLOCKS:
            raise RequestError(
                f"row groups: {len(tables)} tables, but the number of a group is one byte; give at most {MOST_BLOCKS}"
            )
        sizes = member.long().bincount(minlength=len(tables)).tolist()
        if sizes != [table.num_embeddings for table in tables] or len({table.embedding_dim for table in tables}) > 1:
            raise RequestError(
                f"row groups: groups of {sizes} rows do not fit tables of {[t.num_embeddings for t in tables]}; give "
                "one table of the same width for each group"
            )
        self.tables = nn.ModuleList(tables)
        starts = torch.tensor([0, *sizes[:-1]], device=member.device).cumsum(0)
        self.register_buffer("member", member.to(torch.uint8))
        self.register_buffer("places", member.argsort(stable=True).argsort() - starts[member.long()])

    def read(self, index: Tensor) -> Tensor:  # noqa: D102
        member, places = self.get_buffer("member")[index], self.get_buffer("places")[index]
        parts = [member == number for number in range(len(self.tables))]
        rows = torch.cat([table.read(places[part]) for table, part in zip(self._all(), parts, strict=True)])
        order = torch.cat([part.nonzero()[:, 0] for part in parts])
        return rows[order.argsort()]

    def form(self) -> RowBlocks:  # noqa: D102
        return RowBlocks(self.get_buffer("member").cpu(), tuple(table.form() for table in self._all()))

    def _all(self) -> list[CompactTable]:
        return list(self.tables)  # type: ignore[arg-type]
