"""How much is sent, so that a payload meets its budget."""

from __future__ import annotations

from collections.abc import Callable

#: Share of the budget that is filled where more can be sent.
FILLED = 0.98
#: Payloads that are made at most; the share that is aimed at leaves room for their unevenness.
_TRIES, _AIMED = 24, 0.99


def most_within(
    budget: int, most: int, guess: int, make: Callable[[int], bytes], filled: float = FILLED
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

    Returns
    -------
    tuple or None
        The amount and its payload; None if that of 0 does not fit.
    """
    low, high, found = -1, most + 1, None
    amount, before = min(max(guess, 0), most), (0, 0)
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
        slope = (len(payload) - before[1]) / (amount - before[0]) if amount != before[0] else 0.0
        aimed = amount + (_AIMED * budget - len(payload)) / slope if slope > 0 else -1.0
        before = (amount, len(payload))
        if slope == 0 and low >= 0 and high > most:
            # Nothing changed: perhaps all is sent already.
            amount = most
        else:
            amount = round(aimed) if low < aimed < high and round(aimed) != amount else (low + high) // 2
        amount = min(max(amount, low + 1), high - 1)
    if found is None and high > 0:
        payload = make(0)
        found = (0, payload) if len(payload) <= budget else None
    return found
