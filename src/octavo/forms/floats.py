"""Lossless storage of float matrices as small integers that entropy-code well.

The IEEE bit patterns of scales and offsets, read as integers, are piecewise linear logarithms. Their trailing zeros are
dropped (float16 and bfloat16 values in float32 have many), and row and column means are subtracted. The remainder is
split into high digits, which are entropy-coded, and low digits, which are almost random.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from octavo.forms.base import expect, expect_integers

#: Elements sampled to choose the number of low digits.
_SAMPLE = 1 << 16
_INFINITY = 0x7F800000
#: Fewer low digits than this are stored raw.
_DIGITS = 20


def split(values: Tensor) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Integer parts and the few numbers that :func:`join` also needs.

    Parameters
    ----------
    values
        (rows, columns) finite float32.
    """
    bits = values.contiguous().view(torch.int32).long()
    negative, bits = bits < 0, bits & 0x7FFFFFFF
    shift = _trailing_zeros(bits)
    patterns = bits >> shift
    rows = patterns.median(1).values
    patterns = patterns - rows[:, None]
    columns = patterns.median(0).values
    patterns = patterns - columns
    low = _low_digits(patterns)
    parts = {"rows": rows - rows[0], "columns": columns, "high": patterns >> low}
    parts = {name: _narrow(part) for name, part in parts.items()}
    if low:
        parts["low"] = (patterns & ((1 << low) - 1)).to(torch.uint8 if low <= 8 else torch.int32)
    if bool(negative.any()):
        parts["negative"] = negative
    return parts, {"shift": shift, "low": low, "base": int(rows[0])}


def join(parts: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> Tensor:
    """Exact inverse of :func:`split`; everything is checked."""
    shift, low, base = (meta[key] for key in ("shift", "low", "base"))
    expect(all(type(value) is int for value in (shift, low, base)), f"{dict(meta)} are not integers")
    expect(0 <= shift < 32 and 0 <= low < 32 and 0 <= base < 1 << 31, f"{dict(meta)} do not describe float32 values")
    digits = {
        name: expect_integers(parts[name], size, name).long()
        for name, size in (("rows", shape[:1]), ("columns", shape[1:]), ("high", shape))
    }
    # Sums of numbers from a file must not overflow 64 bits.
    expect(all(bool((part.abs() < 1 << 31).all()) for part in digits.values()), "digits of floats are out of range")
    patterns = digits["high"] << low
    if low:
        rest = expect_integers(parts["low"], shape, "low").long()
        expect(bool(((rest >= 0) & (rest < 1 << low)).all()), f"low digits exceed {low} bits")
        patterns |= rest
    patterns += digits["rows"][:, None] + digits["columns"] + base
    expect(
        bool(((patterns >= 0) & (patterns < _INFINITY >> shift)).all()),
        "a float is not finite, or its sign is inconsistent",
    )
    values = (patterns << shift).int().view(torch.float32)
    if "negative" not in parts:
        return values
    return torch.where(expect_integers(parts["negative"], shape, "negative").bool(), -values, values)


def _trailing_zeros(bits: Tensor) -> int:
    """Number of trailing bits that are zero in all patterns, at most 23."""
    shift = 23
    while shift and bool((bits & ((1 << shift) - 1)).any()):
        shift -= 1
    return shift


def _low_digits(patterns: Tensor) -> int:
    """The number of low digits to store raw for the fewest bytes; each table symbol is counted as one byte."""
    sample = patterns.reshape(-1)[:: -(-patterns.numel() // _SAMPLE)]
    values, counts = np.unique(sample.numpy(), return_counts=True)
    costs = []
    for low in range(_DIGITS):
        entropy = float((counts * np.log2(len(sample) / counts)).sum()) / len(sample)
        costs.append((entropy + low) * patterns.numel() + 8 * len(counts))
        # Without the last digit, neighbours become equal; the values stay in order.
        values = values >> 1
        starts = np.flatnonzero(np.diff(values, prepend=values[0] - 1))
        values, counts = values[starts], np.add.reduceat(counts, starts)
    return costs.index(min(costs))


def _narrow(integers: Tensor) -> Tensor:
    for dtype in (torch.int8, torch.int16, torch.int32):
        limits = torch.iinfo(dtype)
        if limits.min <= int(integers.min()) and int(integers.max()) <= limits.max:
            return integers.to(dtype)
    return integers
