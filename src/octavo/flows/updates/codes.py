"""Whole numbers, mostly zeros, times a step for each block: what most codecs of updates send."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from octavo import coding
from octavo.coding import Allowance
from octavo.errors import ArtifactError

#: Bytes of memory that decoding may take for every entry sent, and beside them.
_EACH, _BESIDE = 96, 1 << 20
#: Where more than one entry in so many is not zero, all are sent instead of their places.
_DENSE = 4
#: Gaps from here on are rare enough where bits are worth their coding.
_FAR = 1 << 14
#: Bits that a table has for each value, about.
_TABLE = 8


def pack_codes(places: Tensor, codes: Tensor, elements: int, largest: int) -> tuple[bytes, bytes]:
    """Two parts: gaps between places that rise, and codes that are not zero; no gaps if all elements are sent."""
    kind = torch.int8 if largest < 128 else torch.int16
    if _DENSE * len(places) > elements:
        dense = torch.zeros(elements, dtype=kind).index_copy_(0, places, codes.to(kind))
        return b"", coding.encode(dense, independent=True)
    gaps = places.diff(prepend=torch.tensor([-1])).numpy() - 1
    return _pack_gaps(gaps, elements), coding.encode(codes.to(kind), independent=True)


def unpack_codes(parts: Sequence[memoryview], elements: int, largest: int) -> tuple[Tensor, Tensor]:
    """Places and codes, none of them zero; raises :class:`ArtifactError` before memory is taken.

    Parameters
    ----------
    largest
        Magnitude of the largest code, as for :func:`pack_codes`.
    """
    count, kind = coding.describe(parts[1]).elements, torch.int8 if largest < 128 else torch.int16
    expect(count <= elements, f"{count} entries of {elements}")
    allowance = Allowance(_EACH * count + _BESIDE)
    codes = coding.decode(parts[1], max_elements=count, allowance=allowance)
    expect(codes.dtype == kind and codes.shape == (count,), "its codes are not small integers")
    low, high = (int(codes.min()), int(codes.max())) if count else (0, 0)
    expect(-largest <= low and high <= largest, "a code is out of range")
    if not len(parts[0]):
        expect(count == elements, f"{count} codes for {elements} elements")
        places = codes.nonzero()[:, 0]
        return places, codes[places]
    expect(bool((codes != 0).all()), "a code is zero")
    places = (_unpack_gaps(parts[0], count, elements, allowance) + 1).cumsum(0) - 1
    expect(not count or int(places[-1]) < elements, "a place is out of range")
    return places, codes


def _pack_gaps(gaps: np.ndarray, elements: int) -> bytes:
    """How many low bits, these bits as they are, and what lies above them, coded.

    Gaps between entries that lie anywhere have low bits that no coder makes smaller (Rice, 1979). Without them numbers
    are small, and coding is fast.
    """
    found, costs = np.bincount(np.minimum(gaps, _FAR - 1), minlength=2), list[float]()
    while len(found) > 1:
        costs.append(len(costs) * len(gaps) + _entropy(found))
        # Without one more bit, pairs of values become one.
        found = np.pad(found, (0, len(found) % 2)).reshape(-1, 2).sum(1)
    low = int(np.argmin(costs))
    gaps = gaps.astype(np.int32 if elements < 1 << 31 else np.int64)
    planes = [np.packbits(gaps >> bit & 1).tobytes() for bit in range(low)]
    return bytes([low]) + b"".join(planes) + coding.encode(torch.from_numpy(gaps >> low), independent=True)


def _unpack_gaps(part: memoryview, count: int, elements: int, allowance: Allowance) -> Tensor:
    low, width = part[0], -(-count // 8)
    expect(low <= elements.bit_length() and len(part) > 1 + low * width, "its gaps are cut off")
    blob = part[1 + low * width :]
    expect(coding.describe(blob).shape == (count,), f"its {count} codes have other places")
    gaps = coding.decode(blob, max_elements=count, allowance=allowance).long()
    expect(not count or (int(gaps.min()) >= 0 and int(gaps.max()) <= elements >> low), "a place is out of range")
    for bit in reversed(range(low)):
        plane = np.unpackbits(np.frombuffer(part, np.uint8, width, 1 + bit * width), count=count)
        gaps = gaps * 2 + torch.from_numpy(plane)
    return gaps


def _entropy(counts: np.ndarray) -> float:
    """Bits of values with these counts, the coder's table included."""
    counts = counts[counts > 0]
    total = counts.sum()
    return float(total * np.log2(max(total, 1)) - (counts * np.log2(counts)).sum()) + _TABLE * len(counts)


def pack_scaled(
    places: Tensor, codes: Tensor, steps: Tensor, sizes: Sequence[int], largest: int
) -> tuple[bytes, bytes, bytes]:
    """Three parts: those of :func:`pack_codes`, and the steps (blocks,) of the blocks that have codes."""
    there = counts(places, sizes) > 0
    return *pack_codes(places, codes, sum(sizes), largest), pack_floats(steps[there])


def unpack_scaled(parts: Sequence[memoryview], sizes: Sequence[int], largest: int) -> Tensor:
    """Zeros but for codes times steps, (sum of sizes,) float32; raises :class:`ArtifactError` in time."""
    expect(len(parts[2]) <= 4 * len(sizes), "it has more steps than tensors")
    places, codes = unpack_codes(parts, sum(sizes), largest)
    each = counts(places, sizes)
    each = each[each > 0]
    steps = unpack_floats(parts[2], len(each))
    expect(bool((steps > 0).all()), "a step is not a positive number")
    return torch.zeros(sum(sizes)).index_copy_(0, places, codes * steps.repeat_interleave(each))


def pack_floats(values: Tensor) -> bytes:
    """Floats in four bytes each; none is 0 by rounding or infinite."""
    limits = torch.finfo(torch.float32)
    held = values.double().abs().clamp(limits.tiny, limits.max).copysign(values.double())
    return torch.where(values == 0, 0.0, held).float().numpy().astype("<f4").tobytes()


def unpack_floats(part: memoryview, count: int) -> Tensor:
    """The inverse of :func:`pack_floats`; raises :class:`ArtifactError` unless there are ``count``, all finite."""
    expect(len(part) == 4 * count, f"{len(part)} bytes for {count} numbers")
    values = torch.from_numpy(np.frombuffer(part, "<f4").astype(np.float32))
    expect(bool(torch.isfinite(values).all()), "a number is not finite")
    return values


def counts(places: Tensor, sizes: Sequence[int]) -> Tensor:
    """How many places, which rise, lie in each block, (blocks,)."""
    ends = torch.searchsorted(places, torch.tensor(sizes).cumsum(0))
    return ends.diff(prepend=torch.zeros(1, dtype=ends.dtype))


def expect(condition: bool, what: str) -> None:
    """Raise :class:`ArtifactError` with what is wrong unless the condition holds."""
    if not condition:
        raise ArtifactError(f"payload: {what}; send it again")
