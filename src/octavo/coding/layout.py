"""Context classes: elements of similar magnitude share one stream, hence one table.

Rows and columns have a class each, a logarithm of their magnitude. An element's class is the sum of both, rounded to
coarser steps. Sorted by class, the rows and columns form rectangles; a stream is the concatenation of the rectangles of
one class.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from octavo.coding.container import CHUNK
from octavo.coding.radix import RadixWindow

MAX_CLASSES = 64


@dataclass(frozen=True)
class Stream:
    """A stream's place among all elements, its window and, for ``ans`` only, its table."""

    start: int
    size: int
    window: RadixWindow
    table: np.ndarray | None

    def pieces(self) -> list[tuple[int, int]]:
        """First and last element of each chunk."""
        stop = self.start + self.size
        return [(first, min(first + CHUNK, stop)) for first in range(self.start, stop, CHUNK)]


@dataclass(frozen=True)
class StreamLayout:
    """The place of every element of a matrix.

    Attributes
    ----------
    rows, columns : numpy.ndarray
        Class of each row and column, unsigned bytes below `MAX_CLASSES`.
    merge : int
        Sum of row and column class is divided by this.
    base : int
        First of these quotients with a stream of its own; lower ones join it.
    streams : int
        Number of streams; the last one takes all higher quotients.
    """

    rows: np.ndarray
    columns: np.ndarray
    merge: int = 1
    base: int = 0
    streams: int = 1

    @cached_property
    def row_order(self) -> np.ndarray:
        """Row numbers sorted by class."""
        return np.argsort(self.rows, kind="stable")

    @cached_property
    def column_order(self) -> np.ndarray:
        """Column numbers sorted by class."""
        return np.argsort(self.columns, kind="stable")

    @cached_property
    def bands(self) -> list[tuple[int, int, list[tuple[int, int, int]]]]:
        """Per row class: first and last row, and the stream, first and last column of its parts."""
        column_counts = np.bincount(self.columns, minlength=MAX_CLASSES)
        edges = np.concatenate([[0], np.cumsum(column_counts)]).tolist()
        bands, start = [], 0
        for row_class, height in enumerate(np.bincount(self.rows, minlength=MAX_CLASSES).tolist()):
            if not height:
                continue
            parts: list[tuple[int, int, int]] = []
            for column_class in np.flatnonzero(column_counts).tolist():
                stream = min(max((row_class + column_class) // self.merge - self.base, 0), self.streams - 1)
                first, last = edges[column_class], edges[column_class + 1]
                if parts and parts[-1][0] == stream:
                    first = parts.pop()[1]
                parts.append((stream, first, last))
            bands.append((start, start + height, parts))
            start += height
        return bands

    @cached_property
    def sizes(self) -> list[int]:
        """Elements in each stream."""
        sizes = [0] * self.streams
        for top, bottom, parts in self.bands:
            for stream, first, last in parts:
                sizes[stream] += (bottom - top) * (last - first)
        return sizes

    def _placed(self) -> Iterator[tuple[np.ndarray, list[tuple[int, int, slice]]]]:
        """Yield the rows of each band, and columns and place of its parts in the joined streams."""
        ends = np.concatenate([[0], np.cumsum(self.sizes)]).tolist()
        for top, bottom, parts in self.bands:
            placed = []
            for stream, first, last in parts:
                size = (bottom - top) * (last - first)
                placed.append((first, last, slice(ends[stream], ends[stream] + size)))
                ends[stream] += size
            yield self.row_order[top:bottom], placed

    def gather(self, matrix: np.ndarray) -> np.ndarray:
        """Return all streams of a matrix, one after the other."""
        joined = np.empty(matrix.size, matrix.dtype)
        for rows, parts in self._placed():
            band = matrix[rows].take(self.column_order, axis=1)
            for first, last, place in parts:
                joined[place].reshape(len(rows), -1)[...] = band[:, first:last]
        return joined

    def scatter(self, joined: np.ndarray) -> np.ndarray:
        """Inverse of `gather`."""
        matrix = np.empty((len(self.rows), len(self.columns)), joined.dtype)
        back = np.argsort(self.column_order)
        for rows, parts in self._placed():
            band = np.empty((len(rows), matrix.shape[1]), joined.dtype)
            for first, last, place in parts:
                band[:, first:last] = joined[place].reshape(len(rows), -1)
            matrix[rows] = band.take(back, axis=1)
        return matrix
