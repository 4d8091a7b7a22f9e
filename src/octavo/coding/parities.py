"""Contexts from parities: a bit for every element of a matrix, which elements above it in its column determine.

Trellis-coded quantization has two quantizers, and the parities of earlier codes say which of them made a code. Codes of
one quantizer are distributed otherwise than those of the other, so each gets tables of its own. The bit need not be
stored, but a decoder knows it only row after row: it decodes all streams first, and then takes every element from the
stream that its class and its bit name.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from octavo.coding.layout import MAX_CLASSES, StreamLayout
from octavo.errors import ArtifactError
from octavo.system.compiled import compiled

#: Limits on what a file may say.
MOST_LANES, MOST_TAPS, LONGEST = 64, 8, 64
#: Importing numba takes as long as it saves on so many elements.
_WORTHWHILE = 1 << 22


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

    def bits(self, codes: np.ndarray) -> np.ndarray:
        """The bits of a matrix of codes, uint8.

        Division by ``1 + sum of D^d`` over the integers modulo 2, eight columns to a byte. There the square of a
        polynomial is that of its squared terms, so ``1 / h = h(D) h(D^2) h(D^4) ...`` up to the power of D that leaves
        the matrix.
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
        made = cls(layout, context, ())
        counts = np.bincount(made._streams(matrix).reshape(-1), minlength=2 * layout.streams)
        return cls(layout, context, tuple(counts[::2].tolist()))

    @cached_property
    def sizes(self) -> list[int]:
        """Elements in each stream: of every class those with a bit of zero, and the others."""
        return [part for zero, size in zip(self.zeros, self.layout.sizes, strict=True) for part in (zero, size - zero)]

    @cached_property
    def _by_class(self) -> np.ndarray:
        """(row classes, columns): the first of the two streams of an element."""
        layout = self.layout
        classes = np.arange(MAX_CLASSES)[:, None] + layout.columns.astype(np.int64)
        return 2 * np.clip(classes // layout.merge - layout.base, 0, layout.streams - 1)

    def _streams(self, matrix: np.ndarray) -> np.ndarray:
        return (self._by_class[self.layout.rows] + self.context.bits(matrix)).astype(np.uint16)

    def gather(self, matrix: np.ndarray) -> np.ndarray:
        """Return all streams of a matrix, one after the other."""
        return matrix.reshape(-1)[np.argsort(self._streams(matrix).reshape(-1), kind="stable")]

    def scatter(self, joined: np.ndarray) -> np.ndarray:
        """Inverse of `gather`.

        Raises
        ------
        ArtifactError
            If the codes ask for more elements of a stream than it has.
        """
        matrix = np.empty((len(self.layout.rows), len(self.layout.columns)), joined.dtype)
        ends = np.cumsum(self.sizes)
        own, parities = (np.array(taps, np.int64) for taps in (self.context.own, self.context.parities))
        quick = compiled(_merge) if "numba" in sys.modules or matrix.size >= _WORTHWHILE else None
        merge: Callable[..., Any] = quick or _merged
        starts = ends - np.array(self.sizes)
        rows = self.layout.rows.astype(np.int64)
        if not merge(joined, rows, self._by_class, starts, ends, self.context.lanes, own, parities, matrix):
            raise ArtifactError("coded tensor: the codes do not fit the sizes of their streams")
        return matrix


def _merge(
    joined: np.ndarray,
    rows: np.ndarray,
    by_class: np.ndarray,
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
    # The bits of the last rows.
    ring = np.zeros((depth, width), np.uint8)
    for i in range(height):
        bits, streams = ring[i % depth], by_class[rows[i]]
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
    by_class: np.ndarray,
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
        streams = (by_class[rows[here]] + bits[here]).reshape(-1)
        order = np.argsort(streams, kind="stable")
        counts = np.bincount(streams, minlength=len(at))
        if (at + counts > ends).any():
            return False
        # The place of each element in its stream, in the order of streams.
        first = np.repeat(at - (np.cumsum(counts) - counts), counts)
        found = np.empty(len(order), matrix.dtype)
        found[order] = joined[first + np.arange(len(order))]
        matrix[here] = found.reshape(count, -1)
        at += counts
    return True
