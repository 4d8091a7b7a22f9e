"""An amount is found whose payload meets its budget."""

import pytest

from octavo.flows.filling import FILLED, Slope, most_within


@pytest.mark.parametrize("guess", [0, 1, 500, 10_000, -3, 99_999])
@pytest.mark.parametrize(("fixed", "each"), [(30, 1.7), (4000, 0.3), (0, 12.0)])
def test_budgets_are_met_from_any_guess(guess, fixed, each):
    tries = []

    def make(amount):
        tries.append(amount)
        return bytes(round(fixed + each * amount))

    amount, payload = most_within(5000, 10_000, guess, make)
    assert FILLED * 5000 <= len(payload) <= 5000 or amount == 10_000
    assert len(tries) <= 16 and all(0 <= tried <= 10_000 for tried in tries)


def test_steps_that_are_larger_than_the_room_end_below_it():
    amount, payload = most_within(1000, 50, 25, lambda amount: bytes(10 + 300 * amount))
    assert (amount, len(payload)) == (3, 910)


def test_nothing_fits_or_all_does():
    assert most_within(9, 50, 3, lambda amount: bytes(10 + amount)) is None
    assert most_within(900, 50, 3, lambda amount: bytes(10 + amount)) == (50, bytes(60))
    assert most_within(9, 0, 3, lambda amount: bytes(5)) == (0, bytes(5))


def test_a_remembered_slope_hits_the_budget_at_once():
    tries, slope = [], Slope()

    def make(amount):
        tries.append(amount)
        return bytes(2000 + amount)

    assert most_within(5000, 10_000, 1000, make, slope=slope)[0] >= 2900
    tries.clear()
    assert most_within(6000, 10_000, 3000, make, slope=slope)[0] >= 3880
    assert len(tries) == 2
