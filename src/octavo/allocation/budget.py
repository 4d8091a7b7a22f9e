"""The requested size in bytes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from octavo.errors import RequestError

#: The share of the budget that must be used, unless more bytes no longer lower the measured loss.
USED = 0.98

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Budget:
    """The largest size that the artifact may have.

    Parameters
    ----------
    bytes
        The limit: on its files as ``stat`` counts them, or on its weights in memory.
    asked
        The request in the user's words.
    target
        Name of the target, which says what is counted.
    unit
        What is counted, in words: ``bytes in memory``.
    """

    bytes: int
    asked: str
    target: str = "disk"
    unit: str = "bytes"

    @property
    def least(self) -> int:
        """The smallest size that counts as using the budget."""
        return math.ceil(self.bytes * USED)


def parse_size(text: str | int | float) -> int:
    """Bytes of ``11MB``, ``1.5 GiB`` or a plain number."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmg]?i?b?)\s*", str(text).lower())
    if not match or match[2] not in _UNITS:
        raise RequestError(f"size {text!r} is not a number of bytes; write it like 11MB, 1.5GiB or 11000000")
    return _whole(float(match[1]) * _UNITS[match[2]], f"size {text}")


def _whole(value: float, asked: str) -> int:
    if value >= 2**62:
        raise RequestError(f"{asked}: more bytes than any disk has; ask for fewer")
    return int(value)


def budget(
    original_bytes: int,
    weights: int,
    *,
    ratio: float | None = None,
    size: str | int | None = None,
    bits: float | None = None,
    target: str = "disk",
    unit: str = "bytes",
) -> Budget:
    """The budget from exactly one of ``ratio``, ``size`` and ``bits`` per weight.

    Raises
    ------
    RequestError
        If none or several are given, or the number is not finite and positive, or a ratio is below 1.
    """
    given = {name: value for name, value in (("ratio", ratio), ("size", size), ("bits", bits)) if value is not None}
    if len(given) != 1:
        raise RequestError(f"give exactly one of ratio, size and bits (got {', '.join(given) or 'none of them'})")
    ((name, value),) = given.items()
    if name == "size":
        total, asked = parse_size(value), f"size {value}"
    else:
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number) or number <= 0:
            raise RequestError(f"{name} {value!r} is not a positive finite number")
        if name == "ratio" and number < 1:
            raise RequestError(
                f"ratio {value} is below 1: the artifact would be larger than the source; give at least 1"
            )
        asked = f"ratio {number:g}" if name == "ratio" else f"{number:g} bits per weight"
        total = _whole(original_bytes / number if name == "ratio" else weights * number / 8, asked)
    # A ratio that leaves no bytes is unreachable, not malformed: the error names the largest reachable ratio.
    return Budget(total, asked + unit.removeprefix("bytes"), target, unit)
