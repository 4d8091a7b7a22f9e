"""Encoding with the codec that gives the fewest bytes."""

import math
from functools import lru_cache, partial

import numpy as np
import torch

from octavo.coding import bitpack, packed
from octavo.coding.container import CHUNK, DTYPES, MAX_DEPTH, MAX_DIMENSIONS, NARROW, STORAGE, assemble
from octavo.coding.contexts import ContextPlan, plan
from octavo.coding.layout import StreamLayout
from octavo.coding.parallel import run
from octavo.coding.parities import ParityContext, ParityLayout
from octavo.errors import RequestError

# ANS decodes half as fast as Huffman codes, so a large tensor must become this much smaller to justify it. For a small
# one only its size matters.
ANS_GAIN = 0.005
SMALL = 65536
# Below this, classes cost more than they save.
CONTEXT_ELEMENTS = 16384
# Streams that are split by bits of context are put together element by element, so this must be saved.
SPLIT_GAIN = 0.005
# Vectors of at most so many elements are remembered: every setting of a matrix has the same exponents of its rows and
# columns, and every layout of its codes the same classes. Without this, packing 384 x 384 codes takes a third longer.
REMEMBERED = 4096


def encode(tensor: torch.Tensor, context: ParityContext | None = None, *, independent: bool = False) -> bytes:
    """Store a tensor losslessly in as few bytes as possible.

    Parameters
    ----------
    tensor : torch.Tensor
        Of type bool, uint8, int8, int16, int32 or int64, with at most 32 dimensions.
    context : ParityContext, optional
        Bits on which the values depend; they are used where that saves bytes.
    independent : bool
        Whether no value depends on others, so that nothing but the distribution saves bytes. Then ANS alone is tried,
        which takes less time.

    Returns
    -------
    bytes
        A self-describing blob, the same for the same tensor.

    Raises
    ------
    RequestError
        If the tensor has another type or more dimensions.
    """
    return _encode(tensor, 0, context, independent)


def _encode(tensor: torch.Tensor, depth: int, context: ParityContext | None = None, independent: bool = False) -> bytes:
    if tensor.dtype not in DTYPES:
        raise RequestError(
            f"only bools and integers of up to 64 bits can be coded, not {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}; convert the tensor first"
        )
    if tensor.ndim > MAX_DIMENSIONS:
        raise RequestError(
            f"only tensors of up to {MAX_DIMENSIONS} dimensions can be coded, not of {tensor.ndim}; flatten the tensor "
            "first"
        )
    array = tensor.detach().cpu().contiguous().numpy()
    if array.size <= REMEMBERED:
        # So short a vector has no use for its context.
        return _remembered(array.tobytes(), array.dtype, tensor.dtype, array.shape, depth, independent)
    return _smallest(array, tensor.dtype, depth, context, independent)


@lru_cache(maxsize=512)
def _remembered(
    content: bytes, numbers: np.dtype, dtype: torch.dtype, shape: tuple[int, ...], depth: int, independent: bool
) -> bytes:
    return _smallest(np.frombuffer(content, numbers).reshape(shape), dtype, depth, None, independent)


def _smallest(
    array: np.ndarray, dtype: torch.dtype, depth: int, context: ParityContext | None, independent: bool
) -> bytes:
    if not array.size:
        return assemble("raw", dtype, array.shape, STORAGE[DTYPES.index(dtype)], b"", [])
    array = array.astype(STORAGE[DTYPES.index(dtype)], copy=False)
    low, high = int(array.min()), int(array.max())
    values = array.astype(_narrowest(array.dtype, low, high), copy=False)
    seal = partial(assemble, dtype=dtype, shape=array.shape, storage=values.dtype)

    width = bitpack.width_of(low, high)
    fixed_bytes = min(values.nbytes, bitpack.packed_bytes(values.size, width))
    candidates = _packed(values, low, high, fixed_bytes, depth, context, independent) if width else []
    best = min((seal(codec, tables=t, chunks=c) for codec, t, c in candidates), key=len, default=None)
    if best is not None and len(best) < fixed_bytes:
        return best
    fixed = _fixed(values, low, width, values.nbytes <= fixed_bytes)
    plain = seal(fixed[0], tables=fixed[1], chunks=fixed[2])
    return plain if best is None or len(plain) <= len(best) else best


def _fixed(values: np.ndarray, low: int, width: int, raw: bool) -> tuple[str, bytes, list[bytes]]:
    """Return codec, tables and chunks of ``raw`` or ``bits``."""
    pieces = [values.reshape(-1)[start : start + CHUNK] for start in range(0, values.size, CHUNK)]
    if raw:
        return "raw", b"", [piece.tobytes() for piece in pieces]
    tables = low.to_bytes(8, "little", signed=True) + bytes([width])
    return "bits", tables, run(lambda piece: bitpack.pack(piece, low, width), pieces, values.size)


def _packed(
    values: np.ndarray,
    low: int,
    high: int,
    fixed_bytes: int,
    depth: int,
    context: ParityContext | None,
    independent: bool,
) -> list[tuple[str, bytes, list[bytes]]]:
    """Return the ``huffman`` and ``ans`` candidates: codec, tables and chunks."""
    if depth == MAX_DEPTH and high - low > 255:
        return []
    flat = values.reshape(-1)
    probe = flat[:: -(-flat.size // 4096)]
    middle = int(np.partition(probe, len(probe) // 2)[len(probe) // 2])
    escape_bits = math.inf if depth == MAX_DEPTH else 4.0 + min((high - low).bit_length(), 12)

    nested = partial(_encode, depth=depth + 1)

    def split(layout: StreamLayout | ParityLayout | None) -> packed.Streams:
        return packed.split(values.reshape(len(values), -1) if layout else flat, layout, middle, nested)

    def attempt(codec: str, streams: packed.Streams) -> tuple[str, bytes, list[bytes]]:
        return codec, *packed.encode(streams, codec, escape_bits, nested)

    if independent:
        streams = split(None)
        return [attempt("ans", streams)] if streams.bits < 8 * fixed_bytes else []
    plans = [ContextPlan(None, 0.0)]
    if depth == 0 and values.ndim > 1 and values.size >= CONTEXT_ELEMENTS and 1 < len(values) < values.size:
        plans = plan(values.reshape(len(values), -1), middle)
        if plans[0].bits > 8.1 * fixed_bytes:
            return []
    close = [split(candidate.layout) for candidate in plans if candidate.bits <= 1.01 * plans[0].bits]
    least, best = plans[0].bits, close[:1]
    if context is not None and values.size >= CONTEXT_ELEMENTS and context.suits(values.shape):
        other = split(ParityLayout.of(plans[0].layout, context, values))
        before, after = close[0].bits, other.bits
        if after < (1 - SPLIT_GAIN) * before:
            # Estimates are near enough for large tensors only.
            close = [*close, other] if flat.size < 4 * SMALL else [other]
            least, best = least * after / before, close
    found = [attempt("huffman", candidate) for candidate in close]
    smallest = min(_size(candidate) for candidate in found)
    if flat.size < SMALL:
        found += [attempt("ans", candidate) for candidate in close]
    elif least < 8 * (1 - ANS_GAIN) * 1.02 * min(smallest, fixed_bytes):
        denser = min((attempt("ans", candidate) for candidate in best), key=_size)
        if _size(denser) < (1 - ANS_GAIN) * min(smallest, fixed_bytes):
            found.append(denser)
    return found


def _size(candidate: tuple[str, bytes, list[bytes]]) -> int:
    return len(candidate[1]) + sum(len(chunk) for chunk in candidate[2])


def _narrowest(dtype: np.dtype, low: int, high: int) -> np.dtype:
    """Return the narrowest type that holds the range and is no wider than the tensor's own."""
    for candidate in NARROW:
        limits = np.iinfo(candidate)
        if np.can_cast(candidate, dtype, "safe") and limits.min <= low and high <= limits.max:
            return candidate
    return dtype
