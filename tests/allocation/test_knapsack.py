"""Choosing where settings are few: the best that fits, as found by trying everything."""

import itertools

import numpy as np
import pytest

from octavo.allocation.budget import Budget
from octavo.allocation.knapsack import knapsack
from octavo.allocation.profiles import Curve, Point, Profile
from octavo.allocation.solver import allocate, filled, solve


def tables(seed, sites=4, points=4, unit=1):
    generator = np.random.default_rng(seed)
    costs = generator.integers(2, 40, (sites, points)) * unit
    return costs, generator.lognormal(0, 1.5, (sites, points)), generator


def total(values, chosen):
    return values[np.arange(len(chosen)), chosen].sum()


@pytest.mark.parametrize("unit", [1, 48])
@pytest.mark.parametrize("seed", range(25))
def test_nothing_that_fits_loses_less(seed, unit):
    costs, losses, generator = tables(seed, unit=unit)
    low, high = costs.min(1).sum(), costs.max(1).sum()
    room = int(low + generator.random() * (high - low))
    picks = [pick for pick in itertools.product(range(4), repeat=4) if total(costs, pick) <= room]
    chosen = knapsack(costs, losses, room)
    assert total(costs, chosen) <= room
    assert total(losses, chosen) == pytest.approx(min(total(losses, pick) for pick in picks))


def test_sites_may_have_fewer_points_than_others():
    costs = np.array([[8, 4, 2**62], [16, 2**62, 2**62]])
    losses = np.array([[0.1, 1.0, np.inf], [0.5, np.inf, np.inf]])
    assert knapsack(costs, losses, 24).tolist() == [0, 0]
    assert knapsack(costs, losses, 23).tolist() == [1, 0]
    assert knapsack(np.empty((0, 3), np.int64), np.empty((0, 3)), 5).tolist() == []


def test_costs_too_fine_for_the_table_still_fit_and_come_close():
    generator = np.random.default_rng(0)
    costs = generator.integers(10**8, 10**9, (60, 5))
    losses = generator.lognormal(0, 1, (60, 5)) / costs
    room = int(1.5 * costs.min(1).sum())
    chosen = filled(costs, losses, knapsack(costs, losses, room), room)
    assert total(costs, chosen) <= room
    assert total(losses, chosen) <= 1.001 * total(losses, solve(costs, losses, room))


def profile_of(table, many=12):
    """One large site and many small ones with 4 and 8 bits: the large one lowered lets all small ones rise."""
    curves = [Curve("table", "embedding", (100, 32), [Point("gptq", {"bits": b}, s, x) for b, s, x in table])]
    for index in range(many):
        points = [Point("gptq", {"bits": 8}, 400, 0.001), Point("gptq", {"bits": 4}, 250, 0.02)]
        curves.append(Curve(f"site{index}", "linear", (16, 16), points))
    return Profile("few", "f", 40_000, 6272, 100, curves)


@pytest.mark.parametrize(
    "table, room, eight",
    [
        # Taken by gain a byte, the large site comes first and leaves room for two of the small ones.
        ([(8, 3200, 0.01), (4, 1800, 0.195)], 100 + 1800 + 12 * 400, 12),
        ([(8, 3200, 0.01), (4, 1800, 0.9)], 100 + 1800 + 12 * 400, 2),
        ([(8, 3200, 0.01), (4, 1800, 0.195)], 100 + 3200 + 12 * 250 + 900, 6),
    ],
)
def test_one_large_site_is_weighed_against_many_small_ones(table, room, eight):
    profile = profile_of(table)
    plan = allocate(profile, Budget(room, "", "memory"))
    assert plan.bytes <= room
    assert sum(plan.points[f"site{index}"].setting["bits"] == 8 for index in range(12)) == eight
