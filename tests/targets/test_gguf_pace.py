"""Plans for llama.cpp are no slower than its own mixes of the size."""

import pytest

from octavo.allocation.budget import Budget
from octavo.allocation.plans import Plan
from octavo.allocation.profiles import Curve, Point, Profile
from octavo.allocation.solver import allocate
from octavo.coding.ggml import TYPES
from octavo.targets import get_target
from octavo.targets.gguf_pace import limit, pace

ROWS, COLUMNS = 64, 256


def point(kind: str, weight: float) -> Point:
    """A type whose loss falls fourfold with a bit."""
    return Point("ggml", {"type": kind}, ROWS * TYPES[kind].row_bytes(COLUMNS), weight * 4.0 ** -TYPES[kind].bits)


def profile(kinds: tuple[str, ...] = tuple(TYPES), exact: bool = False) -> Profile:
    curves = [
        Curve(f"layer {place}", "linear", (ROWS, COLUMNS), [point(kind, 1.0 + place) for kind in kinds])
        for place in range(8)
    ]
    for curve in curves if exact else ():
        curve.points.append(Point("source-blocks", {"type": "q5_1"}, point("q5_1", 1).bytes, 0.0))
    return Profile("a model", "", 1 << 20, 8 * ROWS * COLUMNS, 0, curves)


def of_size(bits: float) -> Budget:
    return Budget(int(8 * ROWS * COLUMNS * bits / 8), "size", "gguf")


def best(given: Profile, asked: Budget) -> Plan:
    return allocate(get_target("gguf").considered(given, asked), asked)


@pytest.mark.parametrize("bits", [2.7, 3.2, 4.0, 4.6, 5.3, 5.9, 6.6, 7.5])
def test_the_best_plan_keeps_to_the_time_of_a_mix_of_its_size(bits: float) -> None:
    given, asked = profile(), of_size(bits)
    plan = best(given, asked)
    assert plan.bytes <= asked.bytes
    assert pace(given, plan.points) <= 1.001 * limit(given, asked)
    assert get_target("gguf").admits(given, plan, asked)


def test_a_plan_of_slow_types_does_not_win() -> None:
    given, asked = profile(), of_size(6.0)
    slow = Plan(asked, {curve.site: point("q5_1", 1.0) for curve in given.curves}, 0.0, 0)
    assert not get_target("gguf").admits(given, slow, asked)


def test_a_source_that_fits_as_it_is_stays_so_at_any_speed() -> None:
    given, asked = profile(exact=True), of_size(6.01)
    assert {chosen.method for chosen in best(given, asked).points.values()} == {"source-blocks"}


def test_nothing_is_multiplied_with_an_embedding_beside_a_head() -> None:
    given = profile()
    given.curves[0].kind = "embedding"
    points = {curve.site: point("q4_0", 1.0) for curve in given.curves}
    tied = pace(given, points)
    given.curves[1].kind = "head"
    assert pace(given, points) == pytest.approx(tied * 7 / 8)
