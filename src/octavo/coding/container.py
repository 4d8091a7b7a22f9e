"""The frame around every coded tensor: fixed header, shape, chunk table, parameters, chunks.

Everything before the first chunk is the *head*. One checksum covers the head, and the head holds a checksum of every
chunk. So each byte of a blob is covered exactly once.
"""

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from octavo.coding.fields import Reader, Writer
from octavo.errors import ArtifactError

VERSION = 1
CODECS = ("raw", "bits", "huffman", "ans")
DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# The NumPy type for each of DTYPES; a bool is a byte that is 0 or 1.
STORAGE = tuple(np.dtype(name) for name in ("u1", "u1", "i1", "<i2", "<i4", "<i8"))
NARROW = STORAGE[1:]

# Symbols per chunk: few enough that large tensors decode in parallel, a multiple of 1, 2, 3, 4, 5
# and 8 so that no byte of mixed-radix digits straddles two chunks, and of the bit packer's block.
CHUNK = 120 << 14

# Vectors of classes and escapes are blobs inside the blob and have their own escapes.
MAX_DEPTH = 2

_FIXED = struct.Struct("<BBBBII")
_CRC_AT = 8
#: Tensors with more dimensions are refused.
MAX_DIMENSIONS = 32


@dataclass(frozen=True)
class Header:
    """The header of a blob.

    Attributes
    ----------
    codec : str
        One of ``raw``, ``bits``, ``huffman``, ``ans``.
    dtype : torch.dtype
        Data type of the decoded tensor.
    shape : tuple of int
        Shape of the decoded tensor.
    payload : int
        Bytes of coded elements, without the header and the codec's tables.
    """

    codec: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    payload: int

    @property
    def elements(self) -> int:
        """Number of elements of the decoded tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Parsed:
    """The parts of a blob: `storage` is the type of the values, `tables` the codec's parameters."""

    header: Header
    storage: np.dtype
    tables: Reader
    chunks: list[memoryview]
    checksums: list[int]

    def chunk(self, index: int) -> memoryview:
        """Return a chunk after verifying its checksum."""
        if zlib.crc32(self.chunks[index]) != self.checksums[index]:
            raise ArtifactError(f"coded tensor: checksum mismatch in chunk {index} of {len(self.chunks)}")
        return self.chunks[index]


def assemble(
    codec: str,
    dtype: torch.dtype,
    shape: Sequence[int],
    storage: np.dtype,
    tables: bytes | bytearray,
    chunks: Sequence[bytes | memoryview],
) -> bytes:
    """Build a blob. `storage` is the NumPy type that the codec decodes to before the final cast."""
    writer = Writer()
    for length in shape:
        writer.unsigned(length)
    writer.unsigned(len(chunks))
    for chunk in chunks:
        writer.unsigned(len(chunk))
        writer.data += zlib.crc32(chunk).to_bytes(4, "little")
    writer.data += tables
    types = DTYPES.index(dtype) | NARROW.index(storage) << 4
    head_bytes = _FIXED.size + len(writer.data)
    fixed = _FIXED.pack(VERSION, CODECS.index(codec), types, len(shape), head_bytes, 0)
    checksum = zlib.crc32(writer.data, zlib.crc32(fixed[:_CRC_AT]))
    return b"".join([fixed[:_CRC_AT], checksum.to_bytes(4, "little"), writer.data, *chunks])


def parse(blob: bytes | memoryview | np.ndarray, max_elements: int | None = None) -> Parsed:
    """Parse a blob and verify everything that needs no decoded chunk.

    Parameters
    ----------
    blob : bytes, memoryview or numpy.ndarray
        The output of `assemble`.
    max_elements : int, optional
        Largest number of elements to accept.

    Raises
    ------
    ArtifactError
        If this is not a blob, or it is damaged or holds more than `max_elements`.
    """
    data = _as_bytes(blob)
    if len(data) < _FIXED.size:
        raise ArtifactError(f"coded tensor: {len(data)} bytes are too few for a header")
    version, codec, types, dimensions, head_bytes, checksum = _FIXED.unpack(data[: _FIXED.size])
    if version != VERSION:
        raise ArtifactError(f"coded tensor: unknown version {version} (this Octavo reads version {VERSION})")
    if not _FIXED.size <= head_bytes <= len(data):
        raise ArtifactError(f"coded tensor: a head of {head_bytes} bytes does not fit a blob of {len(data)} bytes")
    if zlib.crc32(data[_FIXED.size : head_bytes], zlib.crc32(data[:_CRC_AT])) != checksum:
        raise ArtifactError("coded tensor: checksum mismatch in the head")
    if codec >= len(CODECS) or types & 15 >= len(DTYPES) or types >> 4 >= len(NARROW):
        raise ArtifactError(f"coded tensor: unknown codec {codec} or data types {types}")
    storage = NARROW[types >> 4]
    if not np.can_cast(storage, STORAGE[types & 15], "safe"):
        raise ArtifactError(f"coded tensor: {storage} values do not fit a {DTYPES[types & 15]} tensor")
    if dimensions > MAX_DIMENSIONS:
        raise ArtifactError(f"coded tensor: {dimensions} dimensions; at most {MAX_DIMENSIONS} are supported")

    reader = Reader(data[_FIXED.size : head_bytes])
    shape = tuple(reader.unsigned() for _ in range(dimensions))
    lengths, checksums = [], []
    # Every entry takes five bytes, so a false count ends with the head instead of going on for long.
    for _ in range(reader.unsigned()):
        lengths.append(reader.unsigned())
        checksums.append(int.from_bytes(reader.take(4), "little"))
    header = Header(CODECS[codec], DTYPES[types & 15], shape, sum(lengths))
    if header.payload != len(data) - head_bytes:
        raise ArtifactError(f"coded tensor: {header.payload} bytes of chunks declared, {len(data) - head_bytes} found")
    # Checked before anything of that size is allocated: no chunk holds more than CHUNK elements.
    if header.elements > len(lengths) * CHUNK or math.prod(max(length, 1) for length in shape) >= 1 << 58:
        raise ArtifactError(f"coded tensor: shape {shape} does not fit {len(lengths)} chunks")
    if max_elements is not None and header.elements > max_elements:
        raise ArtifactError(f"coded tensor: {header.elements} elements, more than the {max_elements} allowed")
    chunks, start = [], head_bytes
    for length in lengths:
        chunks.append(data[start : start + length])
        start += length
    return Parsed(header, storage, reader, chunks, checksums)


def _as_bytes(blob: bytes | memoryview | np.ndarray) -> memoryview:
    """View any buffer as plain bytes."""
    if isinstance(blob, np.ndarray):
        blob = blob.tobytes() if not blob.flags.c_contiguous else blob.reshape(-1).view(np.uint8).data
    view = memoryview(blob)
    return view.cast("B") if view.contiguous and view.nbytes else memoryview(view.tobytes())
