"""Seconds by step of a run."""

from __future__ import annotations

import time


class Clock:
    """Adds up the seconds of steps that follow each other."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Say that a step has ended, which began when the one before it ended."""
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now
