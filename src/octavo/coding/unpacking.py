"""Decoding of ``huffman`` and ``ans``: the inverse of `packed`; no input is trusted."""

import math
from collections.abc import Callable

import numpy as np
import torch

from octavo.coding import ans, huffman
from octavo.coding.allowance import Allowance
from octavo.coding.container import Parsed
from octavo.coding.fields import Reader
from octavo.coding.layout import MAX_CLASSES, Stream, StreamLayout
from octavo.coding.packed import SPLIT
from octavo.coding.parallel import run
from octavo.coding.parities import MOST_TAPS, ParityContext, ParityLayout
from octavo.coding.radix import RadixWindow
from octavo.errors import ArtifactError

# Decodes a vector of the tables, with at most the given number of elements.
NestedDecoder = Callable[[memoryview, int], torch.Tensor]


def decode(parsed: Parsed, nested: NestedDecoder, allowance: Allowance | None = None) -> np.ndarray:
    """Return the values, flat or as a matrix, of blobs of either codec."""
    header, tables = parsed.header, parsed.tables
    if not header.elements:
        raise ArtifactError(f"coded tensor: codec {header.codec} cannot hold zero elements")
    layout = _read_layout(tables, header.shape, nested)
    if allowance is not None and isinstance(layout, ParityLayout):
        # The values in streams and taken from there, and what taking them needs.
        needed = 2 * header.elements * parsed.storage.itemsize + layout.work
        allowance.check(needed, f"a coded tensor of shape {list(header.shape)} in split streams")
    streams, start = [], 0
    for size in layout.sizes if layout else [header.elements]:
        if size:
            streams.append(_read_stream(tables, start, size, header.codec, parsed.storage))
            start += size
    positions, escaped = _read_escapes(parsed, nested, allowance)
    if tables.data:
        raise ArtifactError(f"coded tensor: {len(tables.data)} unread bytes in the head")
    jobs = [(stream, piece) for stream in streams for piece in stream.pieces()]
    if len(jobs) != len(parsed.chunks):
        raise ArtifactError(f"coded tensor: {len(parsed.chunks)} chunks, expected {len(jobs)}")

    values = np.empty(header.elements, parsed.storage)

    def decode_piece(index: int) -> None:
        stream, (first, last) = jobs[index]
        data, count = parsed.chunk(index), -(-(last - first) // stream.window.digits)
        if stream.table is None:
            joined = huffman.decompress(data, count)
        else:
            joined = ans.decompress(data, count, stream.table, header.elements)
        stream.window.split(joined, values[first:last])

    run(decode_piece, range(len(jobs)), header.elements)
    values[positions] = escaped
    return layout.scatter(values) if layout else values


def _read_layout(tables: Reader, shape: tuple[int, ...], nested: NestedDecoder) -> StreamLayout | ParityLayout | None:
    split, streams = divmod(tables.unsigned(), SPLIT)
    if split == streams == 0:
        return None
    merge, base = tables.unsigned(), tables.unsigned()
    known = split <= 1 and 1 <= streams <= 2 * MAX_CLASSES and 1 <= merge <= MAX_CLASSES and base <= 2 * MAX_CLASSES
    if not known or len(shape) < 2:
        raise ArtifactError(f"coded tensor: context classes {streams}, {merge}, {base} do not fit shape {shape}")
    height, width = shape[0], math.prod(shape[1:])
    vectors = []
    for length in (height, width):
        vector = nested(tables.block(), length)
        if vector.dtype != torch.uint8 or vector.shape != (length,) or int(vector.max()) >= MAX_CLASSES:
            raise ArtifactError(f"coded tensor: context classes are not {length} bytes below {MAX_CLASSES}")
        vectors.append(vector.numpy())
    layout = StreamLayout(vectors[0], vectors[1], merge, base, streams)
    return _read_parities(tables, layout, shape) if split else layout


def _read_parities(tables: Reader, layout: StreamLayout, shape: tuple[int, ...]) -> ParityLayout:
    lanes, own, parities, zeros = (_numbers(tables, most) for most in (1, MOST_TAPS, MOST_TAPS, layout.streams))
    context = ParityContext(sum(lanes), tuple(own), tuple(parities))
    context.check()
    if not context.suits(shape):
        raise ArtifactError(f"coded tensor: streams of shape {shape} cannot be split by {context}")
    if len(zeros) != layout.streams or any(zero > size for zero, size in zip(zeros, layout.sizes, strict=True)):
        raise ArtifactError("coded tensor: streams are split into more elements than they have")
    return ParityLayout(layout, context, tuple(zeros))


def _numbers(tables: Reader, most: int) -> list[int]:
    """A block of at most so many integers."""
    inner, found = Reader(tables.block()), list[int]()
    while inner.data and len(found) < most:
        found.append(inner.unsigned())
    if inner.data:
        raise ArtifactError(f"coded tensor: more than {most} numbers in a block of the head")
    return found


def _read_stream(tables: Reader, start: int, size: int, codec: str, storage: np.dtype) -> Stream:
    window = RadixWindow(tables.signed(), tables.unsigned())
    window.check(storage)
    table = np.frombuffer(tables.take(window.span), np.uint8) if codec == "ans" else None
    return Stream(start, size, window, table)


def _read_escapes(parsed: Parsed, nested: NestedDecoder, allowance: Allowance | None) -> tuple[np.ndarray, np.ndarray]:
    """Return positions and values of the escapes."""
    count, elements = parsed.tables.unsigned(), parsed.header.elements
    if count == 0:
        return np.empty(0, np.int64), np.empty(0, parsed.storage)
    if count > elements:
        raise ArtifactError(f"coded tensor: {count} escapes among {elements} elements")
    if allowance is not None:
        # Both the positions and the gaps that are summed to them.
        allowance.check(count * 3 * 8, f"a coded tensor with {count} escapes")
    gaps, escaped = (nested(parsed.tables.block(), count).numpy() for _ in range(2))
    if gaps.shape != (count,) or escaped.shape != (count,) or gaps.dtype != np.int64 or escaped.dtype != parsed.storage:
        raise ArtifactError(f"coded tensor: positions and values of {count} escapes have the wrong shape or type")
    # Gaps below the number of elements cannot overflow before a position is out of range.
    if gaps.min() < 0 or gaps.max() >= elements:
        raise ArtifactError("coded tensor: gap between escapes out of range")
    positions = np.cumsum(gaps + 1) - 1
    if positions.min() < 0 or positions.max() >= elements:
        raise ArtifactError("coded tensor: position of an escape out of range")
    return positions, escaped
