"""A section of the report that a target contributes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: One cell of a section's table; None reads as "not measured".
Cell = str | int | float | None
_NAME = re.compile(r"[a-z][a-z0-9-]*")


@dataclass(frozen=True)
class Section:
    """A part of the report that a target contributes, shown on the page, on the card and in the terminal.

    Parameters
    ----------
    name
        A lower-case word: the section's anchor on the page, and the key of its ``figures`` in ``report.json``.
    title
        Its heading.
    text
        One paragraph of plain text with the main result.
    columns
        Headings of the table; empty if there is none.
    rows
        Cells of the table, one per column. Numbers are rounded for display; give units in the heading.
    notes
        Sentences below, such as warnings.
    figures
        The section's data for machines: the JSON values of ``name`` in ``report.json``.
    """

    name: str
    title: str
    text: str = ""
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[Cell, ...], ...] = ()
    notes: tuple[str, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"section {self.name[:40]!r}: the name must be a lower-case word")
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"section {self.name!r}: every row needs {len(self.columns)} cells, one per column")
