"""Choosing the context classes of a matrix."""

from dataclasses import dataclass

import numpy as np

from octavo.coding.layout import MAX_CLASSES, StreamLayout

# Fine steps of a magnitude per octave; classes are multiples of it.
_FINE = 4
# (fine steps per class, classes per stream): fewer, larger classes need fewer and shorter tables.
_GRIDS = ((1, 2), (2, 1), (2, 2), (4, 1))
_SAMPLE = 1 << 19
# Bits for the table of one more stream, about right for either coder.
_TABLE_BITS = 700
# Bits for a vector of classes besides their entropy.
_VECTOR_BITS = 300


@dataclass(frozen=True)
class ContextPlan:
    """A layout (None: one stream) and the expected bits of its streams and classes."""

    layout: StreamLayout | None
    bits: float


def plan(matrix: np.ndarray, middle: int) -> list[ContextPlan]:
    """Return the best layout and the single stream, cheapest first.

    Parameters
    ----------
    matrix : numpy.ndarray
        Two-dimensional.
    middle : int
        The value that magnitudes are measured from.
    """
    stride = -(-matrix.size // _SAMPLE)
    sample = _centred(matrix[::stride], middle)
    rows = _fine_classes(_row_means(matrix, middle))
    columns = _fine_classes(np.abs(sample).mean(axis=0, dtype=np.float32))
    row_counts, column_counts = np.bincount(rows), np.bincount(columns)
    joint = _joint_counts(sample, rows[::stride], columns, (len(row_counts), len(column_counts)))
    scale = matrix.size / sample.size
    total = joint.sum(axis=(0, 1))
    hidden = scale * float(total @ _LETTER_BITS)
    joint = joint[:, :, total > 0].astype(np.float64)

    single = ContextPlan(None, hidden + scale * _entropy(total) + _TABLE_BITS)
    best = single
    for step, merge in _GRIDS:
        for use_rows, use_columns in ((1, 1), (1, 0), (0, 1)):
            row_class = use_rows * np.arange(len(row_counts)) // step
            column_class = use_columns * np.arange(len(column_counts)) // step
            counts = _regroup(joint, (row_class[:, None] + column_class) // merge)
            low, high, bits = _trim(counts * scale)
            bits += hidden + _entropy(np.bincount(row_class, row_counts)) + _VECTOR_BITS
            bits += _entropy(np.bincount(column_class, column_counts)) + _VECTOR_BITS
            if bits < best.bits:
                vectors = row_class[rows].astype(np.uint8), column_class[columns].astype(np.uint8)
                best = ContextPlan(StreamLayout(*vectors, merge, low, high - low), bits)
    return [best] if best is single else [best, single]


def _letters() -> tuple[np.ndarray, np.ndarray]:
    """Return the letter of every 16-bit integer, and the number of bits that each letter leaves out.

    Letters are exact up to 8, then there are four an octave. The entropy of letters plus the bits left out is close to
    that of the values, with far fewer counts.
    """
    magnitudes = np.arange(1 << 15)
    shifts = np.maximum(np.frexp(magnitudes)[1] - 3, 0)
    letters = shifts * 4 + (magnitudes >> shifts)
    count = int(letters.max()) + 1
    hidden = np.log2(np.maximum(np.bincount(letters, minlength=count), 1))
    negative = np.concatenate([letters[-1:], letters[:0:-1]]) + count
    return np.concatenate([letters, negative]).astype(np.int32), np.concatenate([hidden, hidden])


_LETTER, _LETTER_BITS = _letters()


def _centred(matrix: np.ndarray, middle: int) -> np.ndarray:
    """Return differences from the middle, large ones cut off, as 16-bit integers."""
    limits = np.iinfo(matrix.dtype)
    low, high = max(middle - (1 << 14), int(limits.min)), min(middle + (1 << 14), int(limits.max))
    if matrix.dtype.itemsize > 1:
        matrix = np.clip(matrix, low, high)
    # Sixteen-bit arithmetic wraps, and the difference is known to fit.
    return matrix.astype(np.int16) - np.array(middle).astype(np.int16)


def _row_means(matrix: np.ndarray, middle: int) -> np.ndarray:
    """Mean distance from the middle per row, a few rows at a time."""
    height = max(1, (1 << 18) // matrix.shape[1])
    weights = np.full(matrix.shape[1], 1 / matrix.shape[1], np.float32)
    starts = range(0, len(matrix), height)
    return np.concatenate(
        [np.abs(_centred(matrix[i : i + height], middle)).astype(np.float32) @ weights for i in starts]
    )


def _fine_classes(means: np.ndarray) -> np.ndarray:
    """Logarithm of the scale in fine steps, from zero, outliers clipped.

    The scale is that of a Laplace distribution whose rounded values have this mean magnitude;
    unlike the mean itself it keeps factors additive where most values are zero.
    """
    positive = np.maximum(means.astype(np.float64), 1e-3)
    levels = np.rint(-_FINE * np.log2(np.arcsinh(0.5 / positive))).astype(np.int64)
    half = MAX_CLASSES // 2 - 1
    middle = int(np.median(levels))
    levels = np.clip(levels, middle - half, middle + half)
    return levels - levels.min()


def _joint_counts(sample: np.ndarray, rows: np.ndarray, columns: np.ndarray, classes: tuple[int, int]) -> np.ndarray:
    """Count letters per row and column class."""
    letters = len(_LETTER_BITS)
    index = _LETTER[sample.view(np.uint16)]
    index += ((rows[:, None] * classes[1] + columns) * letters).astype(np.int32)
    return np.bincount(index.reshape(-1), minlength=classes[0] * classes[1] * letters).reshape(*classes, letters)


def _regroup(joint: np.ndarray, streams: np.ndarray) -> np.ndarray:
    """Sum the counts of the cells of each stream."""
    member = streams.reshape(-1) == np.arange(int(streams.max()) + 1)[:, None]
    return member.astype(np.float64) @ joint.reshape(-1, joint.shape[2])


def _trim(counts: np.ndarray) -> tuple[int, int, float]:
    """Join the streams at both ends while that saves bits; return the range left and its bits."""
    used = np.flatnonzero(counts.sum(axis=1))
    low, high = int(used[0]), int(used[-1]) + 1
    rows = list(counts[low:high])
    costs = _entropies(counts[low:high]).tolist()
    for end, neighbour in ((0, 1), (-1, -2)):
        while len(rows) > 1:
            joined = rows[end] + rows[neighbour]
            cost = _entropy(joined)
            if cost > costs[end] + costs[neighbour] + _TABLE_BITS:
                break
            rows[neighbour], costs[neighbour] = joined, cost
            del rows[end], costs[end]
            low += 1 if end == 0 else 0
    return low, low + len(rows), sum(costs) + _TABLE_BITS * len(rows)


def _entropy(counts: np.ndarray) -> float:
    """Bits taken by symbols of these counts."""
    positive = counts[counts > 0].astype(np.float64)
    total = positive.sum()
    return float((positive * np.log2(total / positive)).sum()) if len(positive) else 0.0


def _entropies(counts: np.ndarray) -> np.ndarray:
    """Bits taken by symbols of every row of counts."""
    totals = np.broadcast_to(counts.sum(axis=1, keepdims=True), counts.shape)
    parts = np.divide(totals, counts, out=np.ones_like(counts), where=counts > 0)
    return (counts * np.log2(parts)).sum(axis=1)
