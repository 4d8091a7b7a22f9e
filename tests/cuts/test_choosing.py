"""Units of all places compete, and every place keeps one."""

import doctest

import pytest
import torch

import octavo.cuts.choosing
from octavo.cuts.choosing import best_across
from octavo.errors import RequestError


def test_examples_say_what_happens():
    assert doctest.testmod(octavo.cuts.choosing, extraglobs={"torch": torch}).failed == 0


def test_the_lowest_of_all_go_but_each_place_keeps_one():
    scores = {"low": torch.tensor([0.1, 0.3, 0.2]), "high": torch.tensor([5.0, 5.0, 4.0, 6.0])}
    kept = best_across(scores, 3 / 7)
    assert kept["low"].tolist() == [False, True, False] and kept["high"].tolist() == [True, True, False, True]
    assert all(bool(mask.all()) for mask in best_across(scores, 0.0).values())


@pytest.mark.parametrize(("share", "says"), [(1.0, "is 1.0"), (-0.1, "is -0.1"), (0.9, "leaves 0 units for 1 places")])
def test_shares_that_cannot_be_are_refused(share, says):
    with pytest.raises(RequestError, match=says):
        best_across({"a": torch.ones(4)}, share)


def test_scores_that_are_not_finite_or_not_there_are_refused():
    with pytest.raises(RequestError, match="there are no scores to choose by; give those of at least one place"):
        best_across({}, 0.5)
    with pytest.raises(RequestError, match="a score is not finite"):
        best_across({"a": torch.tensor([1.0, torch.nan])}, 0.5)
