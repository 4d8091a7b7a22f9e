"""Verdicts: intervals by the t quantile, gates, and the counts that pages show."""

import pytest

from octavo.recipes.frame import Gate, Judged, Verdict, gap, tally
from octavo.recipes.frame.judging import quantile, together


def test_intervals_are_of_pairs_by_the_t_quantile():
    found = gap("a over b", (3.0, 4.0, 8.0), (1.0, 3.0, 5.0))
    half = quantile(2) * 1 / 3**0.5
    assert found.mean == 2 and (found.low, found.high) == pytest.approx((2 - half, 2 + half)) and found.pairs == 3
    assert quantile(2) == pytest.approx(4.303, abs=1e-3) and quantile(4) == pytest.approx(2.776, abs=1e-3)
    assert gap("", (3.0, 4.0, 5.0), (3.0,)) == gap("", (3.0, 4.0, 5.0), (3.0, 3.0, 3.0))
    one = gap("one", (3.0,), (1.0,))
    assert one.low == one.high == 2 and str(one) == "one: +2"
    with pytest.raises(ValueError, match="3 figures cannot be paired with 2"):
        gap("", (1.0, 2.0, 3.0), (1.0, 2.0))


@pytest.mark.parametrize(
    "values, margin, verdict",
    [
        ((1.0, 1.1, 0.9), 0.0, "holds"),
        ((1.0, 1.1, 0.9), 0.9, "undecided"),
        ((1.0, 1.1, 0.9), 2.0, "refuted"),
        ((-0.1, 0.0, 0.1), -1.0, "holds"),
        ((0.0,), 0.0, "refuted"),
        ((0.1,), 0.0, "holds"),
    ],
)
def test_the_interval_decides(values, margin, verdict):
    assert gap("", values, (0.0,), margin).verdict == verdict


def test_a_statement_needs_all_of_its_comparisons():
    holds, refuted = gap("", (1.0,), (0.0,)), gap("", (0.0,), (1.0,))
    open_one = gap("", (1.0, -1.0, 0.5), (0.0,))
    assert together([holds]) is Verdict.HOLDS and together([holds, open_one]) is Verdict.UNDECIDED
    assert together([open_one, refuted]) is Verdict.REFUTED
    assert Gate("", (holds,)).passed and not Gate("", (holds, open_one)).passed


def test_counts():
    def claims(published, *verdicts):
        return [Judged("", published, Verdict(verdict), ()) for verdict in verdicts]

    found = claims(True, "holds", "refuted", "not testable") + claims(False, "holds", "undecided")
    assert tally(found) == "published 1/3 (1 not testable) · extra 1/2 (1 undecided)"
    assert tally(claims(True, "holds")) == "published 1/1"
