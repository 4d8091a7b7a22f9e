"""How much memory there is, and which models fit in it as a whole."""

from __future__ import annotations

import math
import os

from octavo.sources.sites import Source

#: A run on a module in memory takes about this many times its float32 weights: themselves, those of the plan that is
#: measured, what is read back from the disk, and activations.
_COPIES = 3.5
#: What Python, PyTorch and transformers take, and the outputs and gradients of one batch.
_BESIDE = 1_500_000_000


#: What Python and PyTorch take before anything is read.
_EMPTY = 300_000_000
#: Share of the machine's memory that a run takes if it is not told.
_SHARE = 0.75


def fits(source: Source, limit: int | None) -> bool:
    """Whether a source's model can be run as a whole in ``limit`` bytes, by default in a share of the machine's.

    What happens to be free at the moment does not count: the same command is to do the same again.
    """
    if limit is None:
        limit = int(_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return 4 * source.weights * _COPIES + _BESIDE <= limit


def least_bytes(source: Source) -> int:
    """Bytes that any run takes: those of Python and PyTorch, and the largest tensor with its copy in float32."""
    return _EMPTY + max((8 * math.prod(shape) for shape in source.shapes.values()), default=0)
