"""Decoding blobs."""

import numpy as np
import torch

from octavo.coding import bitpack, unpacking
from octavo.coding.allowance import Allowance
from octavo.coding.container import CHUNK, DTYPES, MAX_DEPTH, STORAGE, Header, Parsed, parse
from octavo.coding.parallel import run
from octavo.errors import ArtifactError

#: Bytes that decoding needs per element of the few chunks that are decoded at a time.
_CHUNK_BYTES = 16


def decode(
    blob: bytes | memoryview | np.ndarray, *, max_elements: int | None = None, allowance: Allowance | None = None
) -> torch.Tensor:
    """Return the tensor that `encode` stored.

    Parameters
    ----------
    blob : bytes, memoryview or numpy.ndarray
        A blob; it need not be trusted.
    max_elements : int, optional
        Largest number of elements to accept.
    allowance : Allowance, optional
        Limit on memory; the decoded tensor is counted in it.

    Raises
    ------
    ArtifactError
        If this is not a blob, or it is damaged, holds more than `max_elements` or needs more memory than allowed.
    """
    return _decode(blob, max_elements, allowance, 0)


def describe(blob: bytes | memoryview | np.ndarray, *, max_elements: int | None = None) -> Header:
    """Return what a blob holds, without decoding it.

    Parameters
    ----------
    blob : bytes, memoryview or numpy.ndarray
        A blob; it need not be trusted.
    max_elements : int, optional
        Largest number of elements to accept.

    Raises
    ------
    ArtifactError
        If the header is damaged, or the blob holds more than `max_elements`.
    """
    return parse(blob, max_elements).header


def _decode(
    blob: bytes | memoryview | np.ndarray, max_elements: int | None, allowance: Allowance | None, depth: int
) -> torch.Tensor:
    if depth > MAX_DEPTH:
        raise ArtifactError("coded tensor: blobs nested too deeply")
    parsed = parse(blob, max_elements)
    if allowance is not None:
        _count(parsed, allowance)
    if parsed.header.codec in ("raw", "bits"):
        values = _decode_fixed(parsed)
    else:
        values = unpacking.decode(parsed, lambda data, limit: _decode(data, limit, allowance, depth + 1), allowance)
    dtype = parsed.header.dtype
    values = values.reshape(parsed.header.shape)
    if dtype == torch.bool:
        if values.size and values.max() > 1:
            raise ArtifactError("coded tensor: a bool is neither 0 nor 1")
        return torch.from_numpy(values.view(np.bool_))
    return torch.from_numpy(values.astype(STORAGE[DTYPES.index(dtype)], copy=False))


def _count(parsed: Parsed, allowance: Allowance) -> None:
    """Count the decoded tensor, and check that the temporary memory of decoding fits as well."""
    elements, kept = parsed.header.elements, STORAGE[DTYPES.index(parsed.header.dtype)].itemsize
    what = f"a coded tensor of shape {list(parsed.header.shape)}"
    allowance.take(elements * kept, what)
    # The values in their own type, put in streams and taken from there; of a chunk, digits, words and bits.
    wide = 3 if parsed.header.codec in ("huffman", "ans") else 1
    allowance.check(wide * elements * parsed.storage.itemsize + _CHUNK_BYTES * min(elements, CHUNK), what)


def _decode_fixed(parsed: Parsed) -> np.ndarray:
    """Decode ``raw`` and ``bits``."""
    elements, storage = parsed.header.elements, parsed.storage
    if len(parsed.chunks) != -(-elements // CHUNK):
        raise ArtifactError(f"coded tensor: {len(parsed.chunks)} chunks do not fit {elements} elements")
    low = width = 0
    if parsed.header.codec == "bits":
        low = int.from_bytes(parsed.tables.take(8), "little", signed=True)
        width = parsed.tables.take(1)[0]
        limits = np.iinfo(storage)
        if width > 64 or not limits.min <= low <= limits.max:
            raise ArtifactError(f"coded tensor: values of {width} bits starting at {low} do not fit {storage}")
    if parsed.tables.data:
        raise ArtifactError(f"coded tensor: {len(parsed.tables.data)} unread bytes in the head")
    values = np.empty(elements, storage)

    def decode_piece(index: int) -> None:
        data, part = parsed.chunk(index), values[index * CHUNK : (index + 1) * CHUNK]
        if parsed.header.codec == "bits":
            bitpack.unpack(data, low, width, part)
        elif len(data) != part.nbytes:
            raise ArtifactError(f"coded tensor: raw chunk {index} of {len(data)} bytes instead of {part.nbytes}")
        else:
            part[:] = np.frombuffer(data, storage)

    run(decode_piece, range(len(parsed.chunks)), elements)
    return values
