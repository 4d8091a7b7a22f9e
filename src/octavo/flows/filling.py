"""How much is sent, so that a payload meets its budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

#: Share of the budget that is filled where more can be sent.
FILLED = 0.98
#: Payloads that are made at most; the share that is aimed at leaves room for their unevenness.
_TRIES, _AIMED = 24, 0.99


@dataclass
class Slope:
    """How fast payloads grow with the amount, as the last search found it; None before the first."""

    value: float | None = None


def most_within(
    budget: int,
    most: int,
    guess: int,
    make: Callable[[int], bytes],
    filled: float = FILLED,
    doubling: int | None = None,
    slope: Slope | None = None,
) -> tuple[int, bytes] | None:
    """An amount whose payload has at most ``budget`` bytes, and that share of them where there is such an amount.

    Parameters
    ----------
    most
        The largest amount; the smallest is 0.
    guess
        Where to begin.
    make
        The payload of an amount; more takes more bytes, nearly.
    filled
        Share of the budget at which the search ends.
    doubling
        Amounts in which bytes about double; None where bytes are about in proportion.
    slope
        What the last search remembered, so that this one hits the budget sooner; it is brought up to date.

    Returns
    -------
    tuple or None
        The amount and its payload; None if that of 0 does not fit.
    """
    low, high, found = -1, most + 1, None
    amount = min(max(guess, 0), most)
    slope = slope or Slope()
    before: tuple[int, float] | None = (0, 0.0) if doubling is None and slope.value is None else None
    first = slope.value or (1 / doubling if doubling is not None else 0.0)
    for _ in range(_TRIES):
        payload = make(amount)
        if len(payload) <= budget:
            low, found = amount, (amount, payload)
            if amount == most or len(payload) >= filled * budget:
                break
        else:
            high = amount
        if high - low <= 1:
            break
        # Along the line through the last two sizes; what is sent beside the amount is unknown at first.
        height = _height(len(payload), doubling)
        rise = (height - before[1]) / (amount - before[0]) if before and amount != before[0] else first
        if before and rise > 0:
            slope.value = rise
        aimed = amount + (_height(_AIMED * budget, doubling) - height) / rise if rise > 0 else -1.0
        before = (amount, height)
        if rise == 0 and low >= 0 and high > most:
            # Nothing changed: perhaps all is sent already.
            amount = most
        else:
            amount = round(aimed) if low < aimed < high and round(aimed) != amount else (low + high) // 2
        amount = min(max(amount, low + 1), high - 1)
    if found is None and high > 0:
        payload = make(0)
        found = (0, payload) if len(payload) <= budget else None
    return found


def _height(size: float, doubling: int | None) -> float:
    """What rises in proportion to the amount."""
    return size if doubling is None else math.log2(max(size, 1))
