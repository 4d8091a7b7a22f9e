"""Choosing the window of values in which a stream is coded."""

import math
from collections.abc import Callable

import numpy as np

from octavo.coding.radix import SPANS, RadixWindow, digits_of

# Values further than this from the middle are always escapes, since a window spans at most 256.
_REACH = 1024
# Values counted at a time; bounds the temporary indices, eight bytes each.
_BLOCK = 1 << 18
_SPANS = tuple(SPANS.values())

Cost = Callable[[np.ndarray, int], float]


def histogram(values: np.ndarray, middle: int) -> tuple[int, np.ndarray]:
    """Count the values near `middle`; return the value of the first bin and the bins."""
    limits = np.iinfo(values.dtype)
    if values.dtype.itemsize == 1:
        bins = np.zeros(256, np.int64)
        unsigned = values.view(np.uint8)
        for start in range(0, len(values), _BLOCK):
            bins += np.bincount(unsigned[start : start + _BLOCK], minlength=256)
        return int(limits.min), np.roll(bins, -int(limits.min))
    first = max(int(limits.min), min(middle - _REACH, int(limits.max) - 2 * _REACH))
    bins = np.zeros(2 * _REACH, np.int64)
    for start in range(0, len(values), _BLOCK):
        part = values[start : start + _BLOCK]
        near = part[(part >= first) & (part < first + 2 * _REACH)].astype(np.int64) - first
        bins += np.bincount(near, minlength=2 * _REACH)
    return first, bins


def choose(first: int, bins: np.ndarray, total: int, escape_bits: float, cost: Cost) -> tuple[RadixWindow, np.ndarray]:
    """Return the cheapest window and the count of each of its digits, including escapes.

    Parameters
    ----------
    first : int
        Value that the first bin counts.
    bins : numpy.ndarray
        Counts as of `histogram`.
    total : int
        Number of values, counted in a bin or not.
    escape_bits : float
        Bits of a value outside of the window, besides its placeholder. Infinity forbids escapes.
    cost : callable
        Returns the bits of symbols from their counts and the number of digits per byte.
    """
    used = np.flatnonzero(bins)
    start, stop = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
    best: tuple[float, RadixWindow, np.ndarray] | None = None
    # Wider windows than the narrowest that covers everything gain nothing.
    enough = next((place for place, span in enumerate(_SPANS) if span >= stop - start), len(_SPANS) - 1)
    for span in reversed(_SPANS[: enough + 1]):
        low, high = _heaviest(bins, start, stop, span)
        weights = bins[low:high].copy()
        escapes = total - int(weights.sum())
        side = escapes * (escape_bits + math.log2(total / escapes)) if escapes else 0.0
        # Escapes alone cost more than the best window so far, and narrower windows have more of them.
        if best is not None and side > best[0]:
            break
        filler = int(weights.argmax())
        weights[filler] += escapes
        bits = side + cost(weights, digits_of(high - low))
        if best is None or bits <= best[0]:
            best = bits, RadixWindow(first + low, high - low, filler), weights
    assert best is not None
    return best[1], best[2]


def _heaviest(bins: np.ndarray, start: int, stop: int, span: int) -> tuple[int, int]:
    """Return the bounds of the `span` adjacent bins with the largest total, without empty ends."""
    if stop - start > span:
        sums = np.cumsum(bins[start:stop])
        covered = sums[span - 1 :].copy()
        covered[1:] -= sums[:-span]
        start += int(covered.argmax())
        inside = np.flatnonzero(bins[start : start + span])
        start, stop = start + int(inside[0]), start + int(inside[-1]) + 1
    # A window has at least two values; the bins cover more, so one side can be extended.
    if stop - start < 2:
        start, stop = (start, start + 2) if start + 2 <= len(bins) else (start - 1, start + 1)
    return start, stop
