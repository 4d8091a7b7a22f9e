"""Measuring the seconds of each step of a run."""

from __future__ import annotations

import time


class Clock:
    """Adds up the seconds of consecutive steps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End a step, which started at the end of the previous one."""
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now
