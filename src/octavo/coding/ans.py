"""Asymmetric numeral systems (ANS): within a fraction of a percent of the entropy, but slower to decode.

The model of a byte with several digits is the product of the digit models. So the stored table has one entry per digit,
but one decoding step yields several symbols.
"""

import constriction
import numpy as np

from octavo.coding.radix import digits_of
from octavo.errors import ArtifactError

# round(256 * 2 ** (j / 8)): written out because powers may differ by a bit between machines, and decoding needs the
# same numbers. All weights are integers below 2 ** 53, exact as doubles.
_STEPS = np.array([256, 279, 304, 332, 362, 395, 431, 470], np.float64)


def quantize(weights: np.ndarray) -> np.ndarray:
    """Return one byte per count: its base-2 logarithm in steps of an eighth."""
    share = np.maximum(weights, 0.25) / max(float(weights.max()), 0.25)
    return np.clip(np.rint(8 * np.log2(share)) + 255, 0, 255).astype(np.uint8)


def _model(table: np.ndarray) -> constriction.stream.model.Categorical:
    """Return the model of a byte for the output of `quantize`."""
    letters = np.ldexp(_STEPS[table & 7], (table >> 3).astype(np.int32))
    # The sum of integers is exact in any order; products and quotients are correctly rounded.
    letters /= letters.sum()
    bytes_ = letters
    for _ in range(digits_of(len(table)) - 1):
        bytes_ = np.multiply.outer(bytes_, letters).reshape(-1)
    return constriction.stream.model.Categorical(bytes_, perfect=False)


def compress(joined: np.ndarray, table: np.ndarray) -> bytes:
    """Code bytes as little-endian 32-bit words."""
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(joined.astype(np.int32), _model(table))
    return coder.get_compressed().astype("<u4").tobytes()


def decompress(data: memoryview, count: int, table: np.ndarray) -> np.ndarray:
    """Return `count` bytes."""
    if len(data) % 4:
        raise ArtifactError(f"coded tensor: ANS chunk of {len(data)} bytes is not a whole number of 32-bit words")
    words = np.frombuffer(data, "<u4").astype(np.uint32)
    if len(words) and words[-1] == 0:
        raise ArtifactError("coded tensor: ANS chunk ends in a zero word")
    return constriction.stream.stack.AnsCoder(words).decode(_model(table), count).astype(np.uint8)


def cost(weights: np.ndarray, digits: int) -> float:
    """Estimate the bits of symbols with these counts; how many share a byte does not matter."""
    shares = weights[weights > 0] / weights.sum()
    return float(-weights.sum() * (shares * np.log2(shares)).sum()) + 8 * len(weights) + 64
