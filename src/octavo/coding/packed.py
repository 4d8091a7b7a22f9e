"""Encoding as ``huffman`` or ``ans``: context classes, windows and escapes, shared by both coders."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from octavo.coding import ans, huffman, windows
from octavo.coding.fields import Writer
from octavo.coding.layout import Stream, StreamLayout
from octavo.coding.parallel import run
from octavo.coding.parities import ParityLayout

# Encodes a vector that belongs to the tables.
NestedEncoder = Callable[[torch.Tensor], bytes]
#: Added to the number of streams where each is split by a bit of context.
SPLIT = 1 << 10


@dataclass(frozen=True)
class Streams:
    """A tensor in streams: what both coders share.

    Parameters
    ----------
    head
        The layout, coded.
    values
        All streams, one after the other.
    sizes
        Elements in each stream.
    histograms
        Results of `windows.histogram`, one for each stream that is not empty.
    """

    head: bytes
    values: np.ndarray
    sizes: list[int]
    histograms: list[tuple[int, np.ndarray]]

    @property
    def bits(self) -> float:
        """About what the streams take: their entropies, and a table each."""
        return sum(ans.cost(bins[bins > 0], 1) for _, bins in self.histograms) + 8 * len(self.head)


def split(
    values: np.ndarray, layout: StreamLayout | ParityLayout | None, middle: int, nested: NestedEncoder
) -> Streams:
    """Split a flat array, or a matrix if there is a layout, into streams.

    Parameters
    ----------
    values : numpy.ndarray
        Integers of the narrowest type that holds them.
    layout : StreamLayout, ParityLayout or None
        Context classes of a matrix, and bits of context.
    middle : int
        A typical value.
    nested : callable
        Encodes the vectors of classes.
    """
    writer = Writer()
    sizes = [values.size]
    classes = layout.layout if isinstance(layout, ParityLayout) else layout
    writer.unsigned((classes.streams if classes else 0) + (SPLIT if classes is not layout else 0))
    if layout and classes:
        writer.unsigned(classes.merge)
        writer.unsigned(classes.base)
        writer.block(nested(torch.from_numpy(classes.rows)))
        writer.block(nested(torch.from_numpy(classes.columns)))
        if isinstance(layout, ParityLayout):
            for numbers in ((layout.context.lanes,), layout.context.own, layout.context.parities, layout.zeros):
                writer.block(bytes(_unsigned(numbers)))
        values, sizes = layout.gather(values), layout.sizes
    ends = np.cumsum(sizes).tolist()
    parts = [values[end - size : end] for size, end in zip(sizes, ends, strict=True) if size]
    return Streams(bytes(writer.data), values, sizes, [windows.histogram(part, middle) for part in parts])


def _unsigned(numbers: Sequence[int]) -> bytearray:
    writer = Writer()
    for number in numbers:
        writer.unsigned(number)
    return writer.data


def encode(streams: Streams, codec: str, escape_bits: float, nested: NestedEncoder) -> tuple[bytes, list[bytes]]:
    """Return the tables and chunks of a tensor in streams.

    Parameters
    ----------
    streams : Streams
        Result of `split`.
    codec : str
        ``huffman`` or ``ans``.
    escape_bits : float
        See `windows.choose`.
    nested : callable
        Encodes the vectors of escapes.
    """
    writer, values = Writer(), streams.values
    writer.data += streams.head
    cost = huffman.cost if codec == "huffman" else ans.cost
    chunks: list[bytes] = []
    escapes: list[np.ndarray] = []
    start = 0
    for size, histogram in zip(filter(None, streams.sizes), streams.histograms, strict=True):
        window, weights = windows.choose(*histogram, size, escape_bits, cost)
        stream = Stream(start, size, window, ans.quantize(weights) if codec == "ans" else None)
        writer.signed(window.low)
        writer.unsigned(window.span)
        if stream.table is not None:
            writer.data += stream.table.tobytes()
        for chunk, positions in run(partial(_encode_piece, values, stream), stream.pieces(), size):
            chunks.append(chunk)
            escapes.append(positions)
        start += size

    positions = np.concatenate(escapes)
    writer.unsigned(len(positions))
    if len(positions):
        writer.block(nested(torch.from_numpy(np.diff(positions, prepend=-1) - 1)))
        writer.block(nested(torch.from_numpy(values[positions])))
    return bytes(writer.data), chunks


def _encode_piece(values: np.ndarray, stream: Stream, piece: tuple[int, int]) -> tuple[bytes, np.ndarray]:
    """Return a chunk and the positions of its escapes."""
    digits, escapes = stream.window.digitize(values[piece[0] : piece[1]])
    joined = stream.window.join(digits)
    coded = huffman.compress(joined) if stream.table is None else ans.compress(joined, stream.table)
    return coded, escapes + piece[0]
