"""Several small symbols in one byte, as the digits of a number.

A `RadixWindow` of `span` consecutive values is coded as digits ``0..span-1``; ``digits`` of them make one byte. Values
outside the window are *escapes*: their digit is a placeholder, and position and value are stored elsewhere. So one
outlier does not widen the alphabet of the other values.
"""

from dataclasses import dataclass

import numpy as np

from octavo.errors import ArtifactError

# Largest span for every number of digits in a byte: span ** digits <= 256.
SPANS = {8: 2, 5: 3, 4: 4, 3: 6, 2: 16, 1: 256}


def digits_of(span: int) -> int:
    """Most digits of a `span`-letter alphabet that fit a byte."""
    return next(digits for digits, largest in SPANS.items() if span <= largest)


@dataclass(frozen=True)
class RadixWindow:
    """The values ``low..low+span-1``; `filler` is the digit that replaces escapes."""

    low: int
    span: int
    filler: int = 0

    @property
    def digits(self) -> int:
        """Symbols in a byte."""
        return digits_of(self.span)

    def check(self, storage: np.dtype) -> None:
        """Raise unless `storage` can hold every value of the window."""
        limits = np.iinfo(storage)
        if not (2 <= self.span <= 256 and limits.min <= self.low and self.low + self.span - 1 <= limits.max):
            raise ArtifactError(
                f"coded tensor: a window of {self.span} values starting at {self.low} does not fit {storage}"
            )

    def digitize(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the digit of every value and the positions of the escapes."""
        if values.dtype.itemsize == 1:
            offsets = values.view(np.uint8) - np.uint8(self.low & 255)
        else:
            offsets = values.astype(np.int64).view(np.uint64) - np.uint64(self.low & (1 << 64) - 1)
        escapes = np.flatnonzero(offsets >= self.span) if offsets.itemsize > 1 or self.span < 256 else np.empty(0, int)
        digits = offsets.astype(np.uint8, copy=False)
        digits[escapes] = self.filler
        return digits, escapes

    def join(self, digits: np.ndarray) -> np.ndarray:
        """Combine digits to bytes; the first digit of each group is the most significant."""
        per_byte, span = self.digits, np.uint8(self.span & 255)
        if per_byte == 1:
            return digits
        groups = np.pad(digits, (0, -len(digits) % per_byte)).reshape(-1, per_byte)
        joined = groups[:, 0].copy()
        for column in range(1, per_byte):
            joined *= span
            joined += groups[:, column]
        return joined

    def split(self, joined: np.ndarray, out: np.ndarray) -> None:
        """Fill `out` with the values whose digits `join` combined.

        Division by a constant is vectorised by NumPy; looking the digits up is not, and needs
        indices eight times the size of the bytes.
        """
        per_byte, span = self.digits, np.uint8(self.span & 255)
        if per_byte > 1:
            groups = np.empty((len(joined), per_byte), np.uint8)
            for column in range(per_byte - 1, 0, -1):
                quotient = joined // span
                np.subtract(joined, quotient * span, out=groups[:, column])
                joined = quotient
            groups[:, 0] = joined
            joined = groups.reshape(-1)[: len(out)]
        if out.dtype.itemsize == 1:
            np.add(joined, np.uint8(self.low & 255), out=out.view(np.uint8))
        else:
            np.add(joined, self.low, out=out, dtype=out.dtype)
