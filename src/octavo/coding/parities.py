"""Contexts from parities: a bit for every element of a matrix, which elements above it in its column determine.

Trellis-coded quantization has two quantizers, and the parities of earlier codes say which of them made a code. Codes of
one quantizer are distributed otherwise than those of the other, so each gets tables of its own. The bit need not be
stored, but a decoder knows it only row after row: it decodes all streams first, and then takes every element from the
stream that its class and its bit name.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from octavo.coding.layout import MAX_CLASSES, StreamLayout
from octavo.errors import ArtifactError
from octavo.system.compiled import compiled

#: Limits on what a file may say.
MOST_LANES, MOST_TAPS, LONGEST = 64, 8, 64
#: Codes of as many rows as do not depend on each other. NumPy would need far more time for each of fewer.
_LEAST_AT_ONCE = 128
#: Importing numba takes as long as it saves on so many elements.
_WORTHWHILE = 1 << 22
#: Elements that are put in place at once, and bytes of memory that each then takes.
_AT_ONCE, _PLACE_BYTES = 1 << 18, 64


@dataclass(frozen=True)
class ParityContext:
    """``bit[i] = XOR of bit[i - lanes * d] for d in own, and of code[i - lanes * d] & 1 for d in parities``.

    ``i`` is a row. Bits and codes before the first row are zero.
    """

    lanes: int
    own: tuple[int, ...]
    parities: tuple[int, ...]

    def check(self) -> None:
        """Raise :class:`ArtifactError` for numbers that no encoder writes."""
        taps = (*self.own, *self.parities)
        if not 1 <= self.lanes <= MOST_LANES or len(taps) > MOST_TAPS or not all(1 <= tap <= LONGEST for tap in taps):
            raise ArtifactError(f"coded tensor: {self} is no context of parities")

    def suits(self, shape: tuple[int, ...]) -> bool:
        """Whether streams of such a tensor may be split: it is a matrix, and not so narrow that decoding is slow."""
        return len(shape) == 2 and self.lanes * shape[1] >= _LEAST_AT_ONCE

    def bits(self, codes: np.ndarray) -> np.ndarray:
        """The bits of a matrix of codes, uint8.

        Division by ``h = 1 + sum of D^d`` over the integers modulo 2, eight columns to a byte. There the square of a
        polynomial is that of its squared terms. So ``1 / h = h(D) h(D^2) h(D^4) ...``, up to the power of D that
        leaves the matrix.
        """
        odd = np.packbits((codes & 1).astype(np.uint8, copy=False), axis=1)
        chosen = np.zeros_like(odd)
        for tap in self.parities:
            self._add_delayed(chosen, odd, tap)
        power = 1
        while power * self.lanes < len(codes):
            before = chosen.copy()
            for tap in self.own:
                self._add_delayed(chosen, before, tap * power)
            power *= 2
        return np.unpackbits(chosen, axis=1, count=codes.shape[1])

    def _add_delayed(self, total: np.ndarray, part: np.ndarray, steps: int) -> None:
        """Add ``part`` to ``total``, ``steps`` rows of its lane later."""
        rows = steps * self.lanes
        if rows < len(total):
            total[rows:] ^= part[:-rows]


@dataclass(frozen=True)
class ParityLayout:
    """The place of every element of a matrix whose streams are each split by a bit of context.

    Elements of a stream are in the order of the matrix, row after row.

    Attributes
    ----------
    layout : StreamLayout
        The classes of rows and columns.
    context : ParityContext
        What the bits are.
    zeros : tuple of int
        Elements of each stream of the layout whose bit is zero.
    """

    layout: StreamLayout
    context: ParityContext
    zeros: tuple[int, ...]

    @classmethod
    def of(cls, layout: StreamLayout | None, context: ParityContext, matrix: np.ndarray) -> "ParityLayout":
        """Split the streams of a matrix."""
        if layout is None:
            layout = StreamLayout(np.zeros(len(matrix), np.uint8), np.zeros(matrix.shape[1], np.uint8))
        made, counts = cls(layout, context, ()), np.zeros(2 * layout.streams, np.int64)
        for _, streams in made._by_parts(matrix, context.bits(matrix)):
            counts += np.bincount(streams, minlength=len(counts))
        return cls(layout, context, tuple(counts[::2].tolist()))

    @cached_property
    def sizes(self) -> list[int]:
        """Elements in each stream: of every class those with a bit of zero, and the others."""
        return [part for zero, size in zip(self.zeros, self.layout.sizes, strict=True) for part in (zero, size - zero)]

    @cached_property
    def _kinds(self) -> tuple[np.ndarray, np.ndarray]:
        """The distinct row classes, (rows,) as numbers from zero, and (kinds, columns) the first of two streams."""
        layout = self.layout
        used = np.zeros(MAX_CLASSES, bool)
        used[layout.rows] = True
        # Of every sum of classes. Twice the most streams fits a byte, so a matrix of few rows stays small.
        sums = np.clip(np.arange(2 * MAX_CLASSES) // layout.merge - layout.base, 0, layout.streams - 1)
        first = (2 * sums).astype(np.uint8)
        number = (np.cumsum(used) - 1).astype(np.uint8)
        return number[layout.rows], np.stack([first[kind:][layout.columns] for kind in np.flatnonzero(used)])

    @cached_property
    def _starts(self) -> np.ndarray:
        """Where every stream begins."""
        return np.cumsum(self.sizes) - self.sizes

    def _by_parts(self, matrix: np.ndarray, bits: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the codes and streams of few rows at a time."""
        rows, first = self._kinds
        height = max(1, _AT_ONCE // matrix.shape[1])
        for start in range(0, len(matrix), height):
            here = slice(start, start + height)
            yield matrix[here].reshape(-1), (first[rows[here]] + bits[here]).reshape(-1)

    def gather(self, matrix: np.ndarray) -> np.ndarray:
        """Return all streams of a matrix, one after the other."""
        joined, at = np.empty(matrix.size, matrix.dtype), self._starts.copy()
        for codes, streams in self._by_parts(matrix, self.context.bits(matrix)):
            order, places, counts = _places(streams, at)
            joined[places] = codes[order]
            at += counts
        return joined

    def scatter(self, joined: np.ndarray) -> np.ndarray:
        """Inverse of `gather`.

        Raises
        ------
        ArtifactError
            If the codes ask for more elements of a stream than it has.
        """
        rows, first = self._kinds
        matrix = np.empty((len(rows), first.shape[1]), joined.dtype)
        own, parities = (np.array(taps, np.int64) for taps in (self.context.own, self.context.parities))
        quick = compiled(_merge) if "numba" in sys.modules or matrix.size >= _WORTHWHILE else None
        merge: Callable[..., Any] = quick or _merged
        ends = self._starts + self.sizes
        if not merge(joined, rows, first, self._starts.copy(), ends, self.context.lanes, own, parities, matrix):
            raise ArtifactError("coded tensor: the codes do not fit the sizes of their streams")
        return matrix

    @property
    def work(self) -> int:
        """Bytes of memory that `scatter` takes beside its input and result, at most."""
        height, width = len(self.layout.rows), len(self.layout.columns)
        kinds, lanes = min(MAX_CLASSES, height), min(self.context.lanes, height)
        # Numbers of rows; streams of kinds; bits; and of the rows that are put in place at once, orders and places.
        return 16 * height + width * (2 * kinds + 8 + height + _PLACE_BYTES * lanes)


def _places(streams: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The order of elements by stream, their places where each stream is filled so far, and their number by stream."""
    order = np.argsort(streams, kind="stable")
    counts = np.bincount(streams, minlength=len(at))
    places = np.repeat(at - (np.cumsum(counts) - counts), counts)
    places += np.arange(len(order))
    return order, places, counts


def _merge(
    joined: np.ndarray,
    rows: np.ndarray,
    first: np.ndarray,
    at: np.ndarray,
    ends: np.ndarray,
    lanes: int,
    own: np.ndarray,
    parities: np.ndarray,
    matrix: np.ndarray,
) -> bool:
    """Fill a matrix from its streams, for numba; False if a stream is too short."""
    height, width = matrix.shape
    depth = lanes
    for tap in own:
        depth = max(depth, lanes * (tap + 1))
    # The bits of the last rows: no more than there are, whatever a file says.
    depth = min(depth, height)
    ring = np.zeros((depth, width), np.uint8)
    for i in range(height):
        bits, streams = ring[i % depth], first[rows[i]]
        bits[:] = 0
        for tap in own:
            if i >= lanes * tap:
                above = ring[(i - lanes * tap) % depth]
                for j in range(width):
                    bits[j] ^= above[j]
        for tap in parities:
            if i >= lanes * tap:
                codes = matrix[i - lanes * tap]
                for j in range(width):
                    bits[j] ^= np.uint8(codes[j] & 1)
        for j in range(width):
            stream = streams[j] + bits[j]
            place = at[stream]
            if place >= ends[stream]:
                return False
            matrix[i, j] = joined[place]
            at[stream] = place + 1
    return True


def _merged(
    joined: np.ndarray,
    rows: np.ndarray,
    first: np.ndarray,
    at: np.ndarray,
    ends: np.ndarray,
    lanes: int,
    own: np.ndarray,
    parities: np.ndarray,
    matrix: np.ndarray,
) -> bool:
    """NumPy does the same, for as many rows at once as do not depend on each other."""
    bits = np.zeros(matrix.shape, np.uint8)
    for start in range(0, len(matrix), lanes):
        here = slice(start, start + lanes)
        count = len(matrix[here])
        for taps, source in ((own, bits), (parities, matrix)):
            for tap in taps.tolist():
                if start >= lanes * tap:
                    bits[here] ^= (source[start - lanes * tap :][:count] & 1).astype(np.uint8)
        order, places, counts = _places((first[rows[here]] + bits[here]).reshape(-1), at)
        if (at + counts > ends).any():
            return False
        found = np.empty(len(order), matrix.dtype)
        found[order] = joined[places]
        matrix[here] = found.reshape(count, -1)
        at += counts
    return True
