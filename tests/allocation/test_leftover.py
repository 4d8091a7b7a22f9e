"""What a plan leaves of its budget: spent where that lowers the loss, and told truly where it does not."""

import math
import random

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import octavo
from octavo.allocation.leftover import upgrades
from octavo.allocation.profiles import Curve, Point, Profile, alike
from octavo.allocation.solver import uniform
from octavo.methods import get_method
from octavo.report.summary import comparison, verdict

WORDS = 500
DATA = [torch.randint(0, WORDS, (8, 12), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


class Net(nn.Module):
    """A table, blocks and a head, with rows and layers of very different sizes."""

    def __init__(self, width, inner, layers):
        super().__init__()
        self.table, self.head = nn.Embedding(WORDS, width), nn.Linear(width, WORDS)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
            for _ in range(layers)
        )

    def forward(self, index):
        hidden = self.table(index)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden)


def net(width, inner, layers, seed=0):
    torch.manual_seed(seed)
    module = Net(width, inner, layers).eval()
    with torch.no_grad():
        for weight in module.parameters():
            if weight.ndim == 2:
                weight.mul_(torch.randn(len(weight), 1).exp() * float(torch.randn(()).exp()))
    return module


SHAPES = [(64, 256, 3, 4), (96, 384, 1, 5.5), (96, 336, 2, 4), (64, 176, 2, 3)]


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def folded(request, tmp_path_factory):
    *shape, ratio = request.param
    done = octavo.compress(net(*shape), ratio=ratio, target="memory", data=DATA, objective="kl")
    return done, done.save(tmp_path_factory.mktemp("folded") / "out")


def test_every_setting_that_a_kernel_runs_was_tried(folded):
    done, _ = folded
    for curve in done.profile.curves:
        site = done.opened.site(curve.site)
        for name in ("gptq", "rtn"):
            wanted = get_method(name).kernel_settings(
                done.opened.matrix(site), done.run.calibration.evidence[curve.site]
            )
            assert [point.setting for point in curve.points if point.method == name] == wanted


def test_no_choice_that_fits_is_expected_to_lose_less(folded):
    """Neither one site raised alone, nor one raised for another that is lowered."""
    done, report = folded
    points, left = done.built.plan.points, done.budget.bytes - done.built.counted
    assert left >= 0
    if done.built.refused:
        assert "would fit, but did not lower the measured loss" in report["artifact"]["note"]
        return
    moves = [
        (curve.site, point.bytes - points[curve.site].bytes, point.loss - points[curve.site].loss)
        for curve in done.profile.curves
        for point in curve.points
    ]
    corrected = {curve.site: curve for curve in done.profile.curves}

    def gain(site, change):
        old, curve = points[site].loss, corrected[site]
        return done.profile.corrected(curve, old) - done.profile.corrected(curve, old + change)

    moves = [(site, more, gain(site, change)) for site, more, change in moves]
    assert not [move for move in moves if move[1] <= left and move[2] > 1e-12]
    for site, more, gained in moves:
        for other, freed, lost in moves:
            assert site == other or more + freed > left or gained + lost <= 1e-9
    assert bool(report["artifact"]["note"]) == (done.built.counted < done.budget.least)


def test_the_report_says_what_the_best_uniform_plan_takes(folded):
    done, report = folded
    rival, row = done.rival, report["uniform"]
    if rival is None:
        assert row is None and "no single setting" in verdict(report)
        return
    method = row["method"]
    having = [p for p in rival.plan.points.values() if p.method == method and p.setting == row["setting"]]
    assert (row["sites"], row["of"], row["moved"]) == (len(having), len(rival.plan.points), False)
    assert row["held"] == rival.counted <= done.budget.bytes and row["bytes"] == rival.bytes
    # Nothing finer would fit: of all methods and settings it is the one of least loss.
    assert rival.plan.label in {plan.label for plan in uniform(done.profile, done.budget)}
    if report["winner"] == "mixed":
        assert "in memory" in verdict(report)
    assert any(row.label == "In memory, running" and "kB" in row.uniform for row in comparison(report))


def test_more_is_not_lost_than_with_any_uniform_plan(folded):
    done, _ = folded
    assert done.rival is None or done.built.quality <= done.rival.quality


def profile_of(*curves):
    made = [
        Curve(f"site{n}", "linear", (8, 8 + n), [Point("rtn", {"bits": b}, s, x) for b, s, x in points])
        for n, points in enumerate(curves)
    ]
    return Profile("few", "f", 4000, 1000, 0, made)


def chosen(profile, *bits):
    return {
        curve.site: next(point for point in curve.points if point.setting["bits"] == wanted)
        for curve, wanted in zip(profile.curves, bits, strict=True)
    }


def test_what_fits_is_found_best_first():
    points = [(8, 100, 0.1), (4, 50, 1.0), (2, 25, 8.0)]
    profile = profile_of(points, [(bits, size, 10 * loss) for bits, size, loss in points])
    assert upgrades(profile, chosen(profile, 4, 4), 49) == []
    found = upgrades(profile, chosen(profile, 2, 2), 75)
    assert [(site, point.setting["bits"]) for site, point in found] == [("site1", 4), ("site0", 4)]
    assert upgrades(profile, chosen(profile, 2, 2), 75, pinned=["site1"])[-1][1].setting == {"bits": 8}


def test_a_smaller_point_that_is_better_comes_first():
    profile = profile_of([(8, 90, 0.5), (4, 100, 1.0)], [(8, 100, 0.0), (4, 50, 9.0)])
    found = upgrades(profile, chosen(profile, 4, 4), 40)  # fits only with what the first gives back
    assert [(site, point.setting["bits"]) for site, point in found] == [("site0", 8), ("site1", 8)]


def test_a_pinned_or_given_plan_is_not_said_to_be_without_alternative(tmp_path):
    """The note of a plan that was given does not claim that nothing finer fits."""
    module = net(64, 128, 1)
    octavo.profile(module, tmp_path / "measured", target="memory", data=DATA, objective="kl")
    octavo.plan(tmp_path / "measured", ratio=6).save(tmp_path / "plan.yaml")
    edited = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    edited["budget"] *= 2
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(edited))
    done = octavo.compress(
        module, plan=tmp_path / "plan.yaml", workspace=tmp_path / "measured", resume=True, target="memory", data=DATA,
        objective="kl",
    )  # fmt: skip
    note = done.save(tmp_path / "out", report=False)["artifact"]["note"]
    assert note == "less than 98% of the budget is used by this plan"


def one_by_one(profile, points, left, pinned):
    """What :func:`upgrades` has to find, looked for among all points again for each."""
    now, found = dict(points), []
    while True:
        best, most = None, 0.0
        for curves in profile.joint():
            if any(curve.site in pinned for curve in curves):
                continue
            size = sum(now[curve.site].bytes for curve in curves)
            loss = sum(profile.corrected(curve, now[curve.site].loss) for curve in curves)
            for chosen in alike([curve.points for curve in curves]):
                more = sum(point.bytes for point in chosen) - size
                gain = loss - sum(profile.corrected(curve, p.loss) for curve, p in zip(curves, chosen, strict=True))
                if more <= left and gain > 0 and gain / max(more, 1) > most:
                    best, most = (curves, chosen, more), gain / max(more, 1)
        if best is None:
            return found
        left -= best[2]
        raised = [(curve.site, point) for curve, point in zip(best[0], best[1], strict=True)]
        now.update(raised)
        found += raised


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), left=st.integers(0, 3000), sites=st.integers(1, 7))
def test_they_are_those_found_one_by_one(seed, left, sites):
    made = random.Random(seed)
    curves = [
        [
            (bits, made.choice([50, 100, bits * 20]), made.choice([0.0, 1.0, math.nan, made.random()]))
            for bits in range(8)
        ]
        for _ in range(sites)
    ]
    profile = profile_of(*curves)
    profile.options["joined"] = {curve.site: made.choice("ab") for curve in profile.curves if made.random() < 0.5}
    profile.correction = {curve.group: (made.uniform(0.5, 2), made.uniform(0.8, 1.2)) for curve in profile.curves[::2]}
    points = {curve.site: made.choice(curve.points) for curve in profile.curves}
    pinned = [curve.site for curve in profile.curves if made.random() < 0.2]
    assert upgrades(profile, points, left, pinned) == one_by_one(profile, points, left, pinned)
