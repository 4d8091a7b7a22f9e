"""Fixed-width coding: every value takes the same number of bits."""

import numpy as np

from octavo.errors import ArtifactError

# Values unpacked at a time; bounds the temporary array of single bits to 4 MB.
_BLOCK = 1 << 16


def width_of(low: int, high: int) -> int:
    """Bits needed for any value of ``low..high`` once `low` is subtracted."""
    return (high - low).bit_length()


def packed_bytes(count: int, width: int) -> int:
    """Bytes taken by `count` values of `width` bits."""
    return (count * width + 7) // 8


def pack(values: np.ndarray, low: int, width: int) -> bytes:
    """Store ``values - low`` in `width` bits each, most significant bit first."""
    parts = []
    for start in range(0, len(values) if width else 0, _BLOCK):
        part = values[start : start + _BLOCK]
        if part.dtype.itemsize == 1:
            offsets = part.view(np.uint8) - np.uint8(low & 255)
            bits = np.unpackbits(offsets[:, None], axis=1)
        else:
            # Unsigned 64-bit arithmetic wraps, hence is exact for any pair of 64-bit integers.
            wide = part.astype(np.int64).view(np.uint64) - np.uint64(low & (1 << 64) - 1)
            bits = np.unpackbits(wide.astype(">u8").view(np.uint8).reshape(-1, 8), axis=1)
        parts.append(np.packbits(bits[:, bits.shape[1] - width :]).tobytes())
    return b"".join(parts)


def unpack(data: memoryview, low: int, width: int, out: np.ndarray) -> None:
    """Fill `out` with the values that `pack` stored in `data`."""
    if len(data) != packed_bytes(len(out), width):
        raise ArtifactError(f"coded tensor: {len(data)} bytes cannot hold {len(out)} values of {width} bits")
    if width == 0:
        out[:] = low
        return
    source = np.frombuffer(data, np.uint8)
    cell = 8 if width <= 8 else 64
    for start in range(0, len(out), _BLOCK):
        part = out[start : start + _BLOCK]
        first = start * width // 8
        bits = np.unpackbits(source[first : first + packed_bytes(len(part), width)], count=len(part) * width)
        padded = np.zeros((len(part), cell), np.uint8)
        padded[:, cell - width :] = bits.reshape(-1, width)
        joined = np.packbits(padded)
        offsets = joined.astype(np.uint64) if cell == 8 else joined.view(">u8").astype(np.uint64)
        part[:] = (offsets + np.uint64(low & (1 << 64) - 1)).view(np.int64)
