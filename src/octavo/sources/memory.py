"""Available memory, and which models fit in it as a whole."""

from __future__ import annotations

import math
import os

from octavo.sources.source import Source

#: A run on a module in memory takes about this many times its float32 weights: the weights, those of the measured plan,
#: those read back from disk, and activations.
_COPIES = 3.5
#: Bytes for Python, PyTorch and transformers, and the outputs and gradients of one batch.
_BESIDE = 1_500_000_000


#: Bytes for Python and PyTorch before anything is read.
_EMPTY = 300_000_000
#: Default share of the machine's memory for a run.
_SHARE = 0.75


def fits(source: Source, limit: int | None) -> bool:
    """Whether a source's model can run as a whole in ``limit`` bytes, by default a share of the machine's memory.

    The currently free memory is ignored, so that the same command does the same again.
    """
    if limit is None:
        limit = int(_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return 4 * source.weights * _COPIES + _BESIDE <= limit


def least_bytes(source: Source) -> int:
    """Bytes needed by any run: Python, PyTorch, and the largest tensor with a float32 copy."""
    return _EMPTY + max((8 * math.prod(shape) for shape in source.shapes.values()), default=0)
