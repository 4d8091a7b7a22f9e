"""Which plans are worth building."""

import pytest

from octavo.allocation.budget import Budget
from octavo.allocation.plans import Plan
from octavo.artifact import Contents
from octavo.encoding.finish import Built, may_win


def plan(expected: float) -> Plan:
    return Plan(Budget(100, "100 bytes"), {}, expected, 0)


def built(expected: float, measured: float) -> Built:
    return Built(plan(expected), {}, Contents({}), 100, 100, measured)


@pytest.mark.parametrize(
    ("others", "expected", "wins"),
    [
        # MiniLM at ratio 24: the mixed plan loses nearly three times what was expected.
        ([(0.127, 0.353), (0.168, 0.209)], 0.150, True),
        # At ratio 16 expectations hold, and the mixed plan is better.
        ([(0.039, 0.0412), (0.0468, 0.0440)], 0.0457, False),
        # All losses are smaller than expected.
        ([(0.10, 0.08)], 0.09, True),
        # Without a loss nothing is better.
        ([(0.0, 0.0)], 0.01, False),
    ],
)
def test_a_plan_may_win_where_those_that_were_built_err_as_much(others, expected, wins):
    assert may_win(plan(expected), [built(*pair) for pair in others]) is wins
