"""How much memory there is, and which models fit in it as a whole."""

from __future__ import annotations

import os
from pathlib import Path

from octavo.sites import Source

#: A run on a module in memory takes about this many times its float32 weights: themselves, those of the plan that is
#: measured, what is read back from the disk, and activations.
_COPIES = 3.5
#: What Python, PyTorch and transformers take, and the outputs and gradients of one batch.
_BESIDE = 1_500_000_000


def fits(source: Source, limit: int | None) -> bool:
    """Whether a source's model can be run as a whole in ``limit`` bytes, by default in what the machine has left."""
    return 4 * source.weights * _COPIES + _BESIDE <= (available() if limit is None else limit)


def available() -> int:
    """Bytes of memory that can be used without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        # Not Linux: of all memory, half may be another's.
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
