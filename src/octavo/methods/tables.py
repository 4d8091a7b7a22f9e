"""Tables: matrices with so many more rows than columns that rotating the columns costs almost nothing."""

from __future__ import annotations

#: A table has more rows per column than this.
_TALL = 8


def is_table(rows: int, columns: int) -> bool:
    """Whether a matrix is a table."""
    return rows >= least_of_table(columns)


def least_of_table(columns: int) -> int:
    """The smallest number of rows of a table."""
    return _TALL * columns + 1
