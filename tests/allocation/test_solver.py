"""Choosing points: within the budget, near the optimum, never worse than one setting for all."""

import itertools
import math

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.allocation.budget import Budget, budget
from octavo.allocation.interpolation import densified, family
from octavo.allocation.plans import read_plan
from octavo.allocation.profiles import Curve, Point, Profile, envelope
from octavo.allocation.solver import PointTable, allocate, uniform
from octavo.errors import BudgetError, RequestError
from octavo.methods import get_method

#: A method with a continuous setting, and two without.
ELASTIC, FIXED, OTHER = "entropy", "rtn", "svd"


def random_profile(seed, sites=4, points=4, fixed=100):
    """Curves of fixed methods, whose points need not lie on a hull."""
    generator = np.random.default_rng(seed)
    curves = []
    for index in range(sites):
        sizes = np.sort(generator.choice(np.arange(20, 400), points, replace=False))[::-1]
        losses = np.sort(generator.lognormal(0, 1.5, points)) * generator.lognormal(0, 1)
        made = [
            Point(FIXED, {"bits": 8 - k}, int(s), float(x)) for k, (s, x) in enumerate(zip(sizes, losses, strict=True))
        ]
        curves.append(Curve(f"site{index}", "linear", (8, 8 + index), made))
    original = 512 * sites
    return Profile("random", "f", original, 64 * sites, fixed, curves)


def elastic_profile(sites=5):
    """Curves as entropy-constrained quantization gives them, with keep and a fixed method beside it."""
    generator = np.random.default_rng(0)
    curves = []
    for index in range(sites):
        weights, scale = 4000 * (index + 1), float(generator.lognormal(0, 1.5))
        points = [
            Point(ELASTIC, {"step": 2.0**-bits}, round(weights * (bits + 0.25 * 2**-bits) / 8) + 40, scale * 4.0**-bits)
            for bits in (8, 6, 5, 4, 3, 2, 1, 0.5)
        ]
        points += [
            Point(FIXED, {"bits": bits}, weights * bits // 8 + 90, 1.7 * scale * 4.0**-bits) for bits in (8, 4, 2)
        ]
        points += [
            Point("keep", {"dtype": d}, weights * b, scale * 1e-9 * (b == 2))
            for d, b in (("float32", 4), ("float16", 2))
        ]
        curves.append(Curve(f"site{index}", "linear", (index + 1, 4000), points))
    weights = sum(4000 * (index + 1) for index in range(sites))
    return Profile("elastic", "f", 4 * weights, weights, 2000, curves)


def best_by_trying(choices, room):
    best = np.inf
    for picks in itertools.product(*(range(len(points)) for points in choices.points)):
        rows = np.arange(len(picks))
        if choices.bytes[rows, picks].sum() <= room:
            best = min(best, choices.loss[rows, picks].sum())
    return best


@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1.1))
def test_solve_stays_within_the_room_and_near_the_optimum(seed, share):
    choices = PointTable(random_profile(seed))
    low, high = int(choices.bytes.min(1).sum()), int(np.where(choices.bytes < 2**60, choices.bytes, 0).max(1).sum())
    room = int(low + share * (high - low))
    chosen, rows = choices.solve(room), np.arange(4)
    assert choices.bytes[rows, chosen].sum() <= room
    got, best = choices.loss[rows, chosen].sum(), best_by_trying(choices, room)
    # A multiplier misses the optimum by no more than one site's step on its hull.
    finite = np.where(np.isfinite(choices.loss), choices.loss, 0)
    gap = (finite.max(1) - choices.loss.min(1)).max()
    assert best - 1e-9 <= got <= best + gap + 1e-9
    if room >= high:
        assert got == pytest.approx(choices.loss.min(1).sum())


def test_solve_is_mostly_optimal():
    ratios = []
    for seed in range(40):
        choices = PointTable(random_profile(seed))
        low = int(choices.bytes.min(1).sum())
        room = int(low * 1.8)
        chosen = choices.solve(room)
        ratios.append(choices.loss[np.arange(4), chosen].sum() / best_by_trying(choices, room))
    assert np.median(ratios) < 1.02 and np.mean(np.array(ratios) < 1.3) > 0.8


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_more_room_for_continuous_settings_never_costs(seed):
    profile = elastic_profile()
    generator = np.random.default_rng(seed)
    sizes = np.sort(generator.integers(profile.smallest, profile.original_bytes // 2, 6))
    plans = [allocate(profile, Budget(int(size), "")) for size in sizes]
    assert all(plan.bytes <= size for plan, size in zip(plans, sizes, strict=True))
    expected = [plan.expected for plan in plans]
    assert expected == sorted(expected, reverse=True)


@pytest.mark.parametrize("ratio", [2.5, 4, 6, 8, 12, 16, 24])
def test_mixed_plans_are_never_worse_than_uniform_ones(ratio):
    profile = elastic_profile()
    asked = budget(profile.original_bytes, profile.weights, ratio=ratio)
    mixed, rivals = allocate(profile, asked), uniform(profile, asked)
    assert rivals
    for rival in rivals:
        assert rival.bytes <= asked.bytes
        assert mixed.expected <= rival.expected * (1 + 1e-9), rival.label
        assert len({(p.method, str(p.setting)) for p in rival.points.values()}) == 1
    # Near the finest settings that were measured, more bytes would not lower the loss.
    assert (0.99 if ratio > 3 else 0.95) * asked.bytes < mixed.bytes <= asked.bytes
    assert [rival.expected for rival in rivals] == sorted(rival.expected for rival in rivals)


def test_uniform_plans_use_the_finest_setting_that_fits():
    profile = elastic_profile()
    asked = budget(profile.original_bytes, profile.weights, ratio=6)
    plans = {plan.label.split()[0]: plan for plan in uniform(profile, asked)}
    assert {p.setting["bits"] for p in plans[FIXED].points.values()} == {4}
    assert plans[ELASTIC].bytes > 0.995 * asked.bytes
    assert "keep" not in plans


def test_the_margin_is_left_free_and_methods_are_obeyed():
    profile = elastic_profile()
    asked = budget(profile.original_bytes, profile.weights, ratio=8)
    assert allocate(profile, asked, margin=0.1).bytes <= 0.9 * asked.bytes
    only = allocate(profile, asked, methods=[FIXED])
    assert {point.method for point in only.points.values()} == {FIXED}
    assert allocate(profile, asked).expected <= only.expected
    measured = allocate(profile, asked, interpolate=False)
    assert not any(point.estimated for point in measured.points.values())
    assert measured.bytes <= asked.bytes


@pytest.mark.parametrize("fixed", [100, 3000])
def test_an_unreachable_budget_names_a_limit_that_works(fixed):
    profile = elastic_profile()
    profile.fixed_bytes = fixed
    for interpolated in (True, False):
        with pytest.raises(BudgetError) as caught:
            allocate(profile, budget(profile.original_bytes, profile.weights, ratio=500), interpolate=interpolated)
        limit = caught.value.limit
        assert f"{limit:g}" in str(caught.value)
        reachable = budget(profile.original_bytes, profile.weights, ratio=limit)
        assert allocate(profile, reachable, interpolate=interpolated).bytes <= reachable.bytes
        with pytest.raises(BudgetError):
            allocate(profile, budget(profile.original_bytes, profile.weights, ratio=limit + 0.02))


def test_densified_points_lie_between_their_neighbours():
    curve = elastic_profile().curves[2]
    points = sorted((p for p in densified(curve) if p.method == ELASTIC), key=lambda p: p.setting["step"])
    measured = [p for p in points if not p.estimated]
    assert [p for p in curve.points if p.method == ELASTIC] == sorted(measured, key=lambda p: p.setting["step"])
    assert len(points) == len(measured) + 7 * (len(measured) - 1)
    for one, two in itertools.pairwise(points):
        assert one.setting["step"] < two.setting["step"]
        assert one.bytes >= two.bytes and one.loss <= two.loss
    assert [p for p in densified(curve) if p.method != ELASTIC] == [p for p in curve.points if p.method != ELASTIC]


@settings(max_examples=50, deadline=None)
@given(octaves=st.floats(-13, 1))
def test_interpolated_points_are_monotone_and_meet_the_measured(octaves):
    curve = elastic_profile().curves[1]
    point, coarser = (family(curve, ELASTIC).at(place) for place in (octaves, octaves + 0.1))
    assert point.bytes >= coarser.bytes and point.loss <= coarser.loss
    assert point.bytes == family(curve, ELASTIC).bytes_at(octaves)
    for exact in curve.points:
        if exact.method == ELASTIC:
            at = family(curve, ELASTIC).at(get_method(ELASTIC).octaves(exact.setting))
            assert abs(at.bytes - exact.bytes) <= 1 and at.loss == pytest.approx(exact.loss)


def test_the_envelope_never_rises():
    curve = elastic_profile().curves[0]
    loss = envelope(curve)
    values = [loss(size) for size in range(100, 16000, 300)]
    assert values == sorted(values, reverse=True)
    for point in curve.points:
        assert loss(point.bytes) <= point.loss * (1 + 1e-6) + 1e-299
    assert envelope(Curve("s", "linear", (1, 1), curve.points[:1])) is None


def test_corrections_change_what_is_chosen():
    profile = elastic_profile()
    asked = budget(profile.original_bytes, profile.weights, ratio=8)
    before = allocate(profile, asked)
    profile.correction = {profile.curves[0].group: (1000.0, 1.0)}
    after = allocate(profile, asked)
    assert after.points["site0"].bytes > before.points["site0"].bytes
    assert after.bytes <= asked.bytes
    profile.correction = {curve.group: (3.0, 1.0) for curve in profile.curves}
    scaled = allocate(profile, asked)
    assert scaled.expected == pytest.approx(3 * before.expected, rel=1e-6)


def test_profiles_survive_their_file(tmp_path):
    profile = elastic_profile()
    profile.correction, profile.options = {"linear 1x4000": (1.5, 0.9)}, {"bits": 3.5, "kept": True}
    profile.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == profile


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"octavo_profile": 99}', '{"octavo_profile": 1}', "\x00", '"x"'])
def test_files_that_are_no_profile_are_refused(tmp_path, content):
    (tmp_path / "profile.json").write_text(content)
    with pytest.raises(RequestError, match=r"profile\.json"):
        Profile.load(tmp_path / "profile.json")
    with pytest.raises(RequestError, match="nowhere"):
        Profile.load(tmp_path / "nowhere")


def sites_of(profile):
    return [curve.site for curve in profile.curves]


def saved_plan(tmp_path):
    profile = elastic_profile()
    plan = allocate(profile, budget(profile.original_bytes, profile.weights, ratio=8))
    plan.save(tmp_path / "plan.yaml")
    return profile, plan, tmp_path / "plan.yaml"


def test_plans_survive_their_file(tmp_path):
    profile, plan, path = saved_plan(tmp_path)
    again = read_plan(path, sites_of(profile))
    assert again.budget == plan.budget and again.label == plan.label
    assert list(again.points) == list(plan.points)
    for name, point in plan.points.items():
        assert (again.points[name].method, again.points[name].setting, again.points[name].bytes) == (
            point.method, point.setting, point.bytes,
        )  # fmt: skip
        assert again.points[name].loss == pytest.approx(point.loss, rel=1e-3)


def test_plans_can_be_edited(tmp_path):
    profile, _, path = saved_plan(tmp_path)
    data = yaml.safe_load(path.read_text())
    data["sites"]["site1"] = {"method": "gptq", "setting": {"bits": 3, "group": 64}}
    path.write_text(yaml.safe_dump(data))
    point = read_plan(path, sites_of(profile)).points["site1"]
    assert (point.method, point.setting) == ("gptq", {"bits": 3, "group": 64})


def without_site(data):
    del data["sites"]["site2"]


def stranger(data):
    data["sites"]["other.weight"] = dict(data["sites"]["site1"])


def unknown_method(data):
    data["sites"]["site1"]["method"] = "magic"


def no_setting(data):
    data["sites"]["site1"]["setting"] = None


def no_budget(data):
    del data["budget"]


@pytest.mark.parametrize(
    "edit, words",
    [
        (without_site, "'site2' is missing"), (stranger, "'other.weight' is not in the source"),
        (unknown_method, "magic"),
        (no_setting, "not a plan"), (no_budget, "not a plan"),
    ],
)  # fmt: skip
def test_broken_plans_are_refused(tmp_path, edit, words):
    profile, _, path = saved_plan(tmp_path)
    data = yaml.safe_load(path.read_text())
    edit(data)
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(RequestError, match=words):
        read_plan(path, sites_of(profile))


@pytest.mark.parametrize("content", ["", "[1, 2]", "a: [", "text", "sites: 3"])
def test_files_that_are_no_plan_are_refused(tmp_path, content):
    (tmp_path / "plan.yaml").write_text(content)
    with pytest.raises(RequestError, match=r"plan\.yaml"):
        read_plan(tmp_path / "plan.yaml", sites_of(elastic_profile()))


def test_the_smallest_is_what_it_says():
    profile = random_profile(1)
    assert profile.smallest == profile.fixed_bytes + sum(min(p.bytes for p in c.points) for c in profile.curves)
    tight = allocate(profile, Budget(profile.smallest, "tight"))
    assert tight.bytes == profile.smallest
    assert torch.tensor([tight.points[c.site].bytes == min(p.bytes for p in c.points) for c in profile.curves]).all()


@pytest.mark.parametrize("correction", [{}, {"linear 8x8": (2.0, 0.9)}])
def test_a_loss_that_is_not_a_number_is_not_none(correction):
    """A point whose loss is NaN is smaller than all others, and still no plan has it that can do without."""
    bad = Point(FIXED, {"bits": 2}, 20, math.nan)
    points = [Point("keep", {"dtype": "float32"}, 64, 0.0), Point(FIXED, {"bits": 4}, 30, 0.1), bad]
    profile = Profile("nan", "f", 64, 16, 0, [Curve("a", "linear", (8, 8), points)], correction)
    assert profile.corrected(profile.curves[0], math.nan) == math.inf
    assert [allocate(profile, Budget(size, "")).points["a"].bytes for size in (64, 63, 30)] == [64, 30, 30]
    assert all(plan.points["a"] is not bad for plan in uniform(profile, Budget(40, "")))
