"""Asymmetric numeral systems (ANS): within a fraction of a percent of the entropy, but slower to decode.

The model of a byte with several digits is the product of the digit models. So the stored table has one entry per digit,
but one decoding step yields several symbols. The coder is constriction's. Its streams are read four times as fast by a
loop of our own, where numba compiles it.
"""

import sys

import constriction
import numpy as np

from octavo.coding.radix import digits_of
from octavo.errors import ArtifactError
from octavo.system.compiled import compiled

# round(256 * 2 ** (j / 8)): written out because powers may differ by a bit between machines, and decoding needs the
# same numbers. All weights are integers below 2 ** 53, exact as doubles.
_STEPS = np.array([256, 279, 304, 332, 362, 395, 431, 470], np.float64)

#: Bits of constriction's probabilities, and of the table that finds a symbol by the first of them.
_PRECISION, _FIRST = 24, 12
#: Importing numba takes as long as it saves on so many elements.
_WORTHWHILE = 1 << 24
#: Bytes that this process has read without numba. Once they are twice as many, it most likely goes on reading, as where
#: a model is loaded again and again, and imports it.
_read_slowly = {"bytes": 0}


def quantize(weights: np.ndarray) -> np.ndarray:
    """Return one byte per count: its base-2 logarithm in steps of an eighth."""
    share = np.maximum(weights, 0.25) / max(float(weights.max()), 0.25)
    return np.clip(np.rint(8 * np.log2(share)) + 255, 0, 255).astype(np.uint8)


def _shares(table: np.ndarray) -> np.ndarray:
    """Return the shares of all bytes, float64, for the output of `quantize`."""
    letters = np.ldexp(_STEPS[table & 7], (table >> 3).astype(np.int32))
    # The sum of integers is exact in any order; products and quotients are correctly rounded.
    letters /= letters.sum()
    bytes_ = letters
    for _ in range(digits_of(len(table)) - 1):
        bytes_ = np.multiply.outer(bytes_, letters).reshape(-1)
    return bytes_


def _model(table: np.ndarray) -> constriction.stream.model.Categorical:
    """Return the model of a byte."""
    return constriction.stream.model.Categorical(_shares(table), perfect=False)


def compress(joined: np.ndarray, table: np.ndarray) -> bytes:
    """Code bytes as little-endian 32-bit words."""
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(joined.astype(np.int32), _model(table))
    return coder.get_compressed().astype("<u4").tobytes()


def decompress(data: memoryview, count: int, table: np.ndarray, elements: int = 0) -> np.ndarray:
    """Return `count` bytes, part of a tensor of so many elements."""
    if len(data) % 4:
        raise ArtifactError(f"coded tensor: ANS chunk of {len(data)} bytes is not a whole number of 32-bit words")
    words = np.frombuffer(data, "<u4").astype(np.uint32)
    if len(words) and words[-1] == 0:
        raise ArtifactError("coded tensor: ANS chunk ends in a zero word")
    if len(words) and ("numba" in sys.modules or max(elements, _read_slowly["bytes"] // 2) >= _WORTHWHILE):
        quick = compiled(_read)
        if quick is not None:
            found = np.empty(count, np.uint8)
            # A whole stream leaves nothing. Anything else is left to constriction, damaged data above all.
            if quick(words, *_tables(table), found):
                return found
    _read_slowly["bytes"] += count
    return constriction.stream.stack.AnsCoder(words).decode(_model(table), count).astype(np.uint8)


def _tables(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where every byte's quantiles start, with their end, and the byte at every first bits of a quantile."""
    shares = _shares(table)
    # As constriction rounds shares that need not be perfect: each byte gets one, and its share of the rest. Its sums
    # run from the first share to the last, which the last bit of a float depends on.
    sums = np.cumsum(shares)
    scale = ((1 << _PRECISION) - len(shares)) / sums[-1]
    before = np.concatenate([[0.0], sums[:-1]])
    starts = (before * scale).astype(np.int64) + np.arange(len(shares))
    starts = np.append(starts, 1 << _PRECISION)
    first = np.searchsorted(starts, np.arange(1 << _FIRST) << (_PRECISION - _FIRST), side="right") - 1
    return starts, first


def _read(words: np.ndarray, starts: np.ndarray, first: np.ndarray, found: np.ndarray) -> bool:
    """Fill `found` from a stream of constriction's stack coder, for numba; False unless that leaves nothing."""
    word, precision = np.uint64(32), np.uint64(_PRECISION)
    mask, low = (np.uint64(1) << precision) - np.uint64(1), np.uint64(1) << word
    at = len(words) - 1
    state = np.uint64(words[at])
    if at > 0:
        at -= 1
        state = (state << word) | np.uint64(words[at])
    for i in range(len(found)):
        quantile = np.int64(state & mask)
        byte = first[quantile >> (_PRECISION - _FIRST)]
        while starts[byte + 1] <= quantile:
            byte += 1
        share = np.uint64(starts[byte + 1] - starts[byte])
        state = (state >> precision) * share + np.uint64(quantile - starts[byte])
        if state < low and at > 0:
            at -= 1
            state = (state << word) | np.uint64(words[at])
        found[i] = byte
    return at == 0 and state == 0


def cost(weights: np.ndarray, digits: int) -> float:
    """Estimate the bits of symbols with these counts; how many share a byte does not matter."""
    shares = weights[weights > 0] / weights.sum()
    return float(-weights.sum() * (shares * np.log2(shares)).sum()) + 8 * len(weights) + 64
