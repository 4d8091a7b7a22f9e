"""The speed that was asked for."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from octavo.errors import RequestError
from octavo.runtimes.onnx.exporting import parse_shape
from octavo.targets.base import Goal


@dataclass(frozen=True)
class Asked(Goal):
    """The speed that was asked for: a factor over PyTorch in float32, or seconds; the other is 0 or None.

    Parameters
    ----------
    shape
        Sequences and tokens at which it counts.
    """

    shape: tuple[int, int] = (1, 32)
    speedup: float = 0.0
    seconds: float | None = None

    @property
    def words(self) -> str:
        """The request in the user's words."""
        return f"speedup {self.speedup:g}" if self.seconds is None else f"latency {self.seconds * 1e3:g}ms"

    def allowed(self, dense: float) -> float:
        """Seconds that the model may take where the dense one takes ``dense``."""
        return dense / self.speedup if self.seconds is None else self.seconds


def parse_latency(text: str | float) -> float:
    """Seconds of ``5ms``, ``0.8 s``, ``300us``, or of a plain number of seconds."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(us|ms|s|)\s*", str(text).lower())
    if not match or not float(match[1]) > 0:
        raise RequestError(f"latency {text!r} is not a time; write it like 5ms, 300us or 0.8s")
    return float(match[1]) * {"us": 1e-6, "ms": 1e-3}.get(match[2], 1.0)


def asked_for(speedup: float | None, latency: str | float | None, shape: str | Sequence[int]) -> Asked:
    """The request from exactly one of ``speedup`` and ``latency``.

    Raises
    ------
    RequestError
        If none or both are given, or a number is none.
    """
    if (speedup is None) == (latency is None):
        raise RequestError(
            "for speed, give exactly one of speedup and latency (such as --speedup 2.5 or --latency 5ms)"
        )
    if speedup is None:
        assert latency is not None
        return Asked(shape=parse_shape(shape), seconds=parse_latency(latency))
    if not math.isfinite(speedup) or speedup <= 0:
        raise RequestError(f"speedup {speedup!r} is not a positive finite number")
    return Asked(shape=parse_shape(shape), speedup=float(speedup))
