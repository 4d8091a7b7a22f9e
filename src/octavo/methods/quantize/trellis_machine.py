"""The states of the trellis of :mod:`octavo.forms.trellis` and their transitions."""

from __future__ import annotations

import numpy as np

from octavo.forms.trellis import PARITY_TAPS, QUANTIZER_TAPS

#: Targets beyond this are returned as they are: their levels would leave 32 bits.
LARGEST = 2**30


def _machine() -> tuple[np.ndarray, np.ndarray]:
    """Return the two predecessors of every state, and the remainder modulo 4 of the levels leading from each.

    A state holds the contribution of the past to the current quantizer (its lowest bit) and to later ones. From a state
    of quantizer q, a code of parity p means a level of remainder ``2 p + q``. Both tables have shape (states, 2).
    """
    states = 1 << max(*QUANTIZER_TAPS, *PARITY_TAPS)
    quantizer_taps, parity_taps = (sum(1 << (tap - 1) for tap in taps) for taps in (QUANTIZER_TAPS, PARITY_TAPS))
    ways: list[list[tuple[int, int]]] = [[] for _ in range(states)]
    for state in range(states):
        for parity in (0, 1):
            quantizer = state & 1
            after = (state >> 1) ^ (quantizer * quantizer_taps) ^ (parity * parity_taps)
            ways[after].append((state, 2 * parity + quantizer))
    table = np.array(ways)
    return np.ascontiguousarray(table[:, :, 0]), np.ascontiguousarray(table[:, :, 1])


BEFORE, REMAINDER = _machine()
STATES = len(BEFORE)
