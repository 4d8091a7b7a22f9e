"""Tables: matrices of so many more rows than columns that a rotation of the columns costs next to nothing."""

from __future__ import annotations

#: Rows for each column that a table has more than.
_TALL = 8


def is_table(rows: int, columns: int) -> bool:
    """Whether a matrix is a table."""
    return rows >= least_of_table(columns)


def least_of_table(columns: int) -> int:
    """The fewest rows of a table."""
    return _TALL * columns + 1
