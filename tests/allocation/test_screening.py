"""What a few sites of a kind show about a budget is tried at the others, and nothing else."""

import math

import pytest
import torch
from torch import nn

import octavo
from octavo.allocation.profiles import Curve, Point
from octavo.allocation.screening import kind_of, pilots, reaches
from octavo.allocation.site_curves import profile_site
from octavo.allocation.windows import Reach, Window
from octavo.calibration.evidence import Evidence
from octavo.methods import get_method
from octavo.sources.sites import Site


def layer(number, role="up", shape=(64, 48)):
    return Site(f"layers.{number}.{role}.weight", "linear", shape, torch.float32)


def curve(site, offset=0.0):
    """A trellis at twelve steps, and rounding that needs a bit more."""
    steps = [2.0**octave for octave in range(-13, -1)]
    size = math.prod(site.shape)
    points = [Point("trellis", {"step": step}, round(size * -math.log2(step) / 8), step**2 * size) for step in steps]
    points += [
        Point("gptq", {"bits": bits, "group": 64}, size * bits // 8, 4.0 ** (1 - bits) * size) for bits in (3, 5)
    ]
    return Curve(site.name, site.kind, site.shape, points)


def test_pilots_are_of_every_role_and_from_all_depths():
    sites = [layer(number, role) for number in range(24) for role in ("up", "down")]
    found = pilots([*sites, layer(0, "head")], pinned=["layers.0.up.weight"])
    assert "layers.0.head.weight" in found and "layers.0.up.weight" not in found
    for role in ("up", "down"):
        places = sorted(int(name.split(".")[1]) for name in found if role in name)
        assert len(places) == 3 and places[0] < 8 <= places[1] < 16 <= places[2]


def test_a_few_sites_are_all_pilots():
    sites = [Site(name, "linear", (64, 48), torch.float32) for name in ("query", "key", "value")]
    assert pilots(sites) == {"query", "key", "value"}


def test_what_lies_far_from_the_budget_is_out_of_reach():
    sites = [layer(number) for number in range(8)]
    found = reaches([curve(sites[3])], sites, 6.0)[kind_of(sites[0])]
    assert set(found) == {"trellis"}
    assert found["trellis"].low <= -6 <= found["trellis"].high
    low, high = found["trellis"].near
    assert found["trellis"].low <= low <= -6 <= high <= found["trellis"].high


def test_settings_far_from_the_budget_have_gaps():
    method = get_method("trellis")
    settings = [{"step": 2.0**octave} for octave in range(-16, 0)]
    reach = Reach(-13, -3, near=(-9, -7))
    kept = [round(method.octaves(setting)) for setting in reach.of(method, settings, gaps=True)]
    assert kept == [-13, -11, -10, -9, -8, -7, -6, -5, -3]
    assert len(reach.of(method, settings, gaps=False)) == 11
    # Sizes are interpolated, however far a site lies from the pilots.
    assert reach.of(method, settings[-2:], gaps=True) == settings[-2:]
    assert len(Reach(3, 4).of(method, settings, gaps=True)) == 2


def test_methods_out_of_reach_are_not_tried_but_for_the_plain_one():
    site, weight = layer(0), torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    methods = [get_method(name) for name in ("keep", "entropy", "trellis", "gptq", "rtn")]
    evidence = Evidence(torch.full((64,), 1e-3), None)
    window = Window(1, 8, bits=4, reach={"trellis": Reach(-3, -3)})
    tried = {point.method for point in profile_site(site, weight, evidence, methods, window).points}
    assert tried == {"keep", "trellis", "rtn"}


class Deep(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(layers))

    def forward(self, x):
        for one in self.layers:
            x = x + torch.tanh(one(x)) / 4
        return x


@pytest.fixture(scope="module")
def deep():
    torch.manual_seed(0)
    return Deep(12).eval(), [torch.randn(32, 128) for _ in range(4)]


def test_a_budget_measures_less_than_a_saved_profile(deep, tmp_path):
    module, data = deep
    choices = {"data": data, "objective": "squared", "methods": ["entropy", "trellis", "gptq", "rtn", "keep"]}
    done = octavo.compress(module, ratio=7, **choices)
    assert done.built.counted >= done.budget.least
    complete = octavo.profile(module, tmp_path / "complete", **choices)
    counts, every = ({curve.site: len(curve.points) for curve in found.curves} for found in (done.profile, complete))
    whole = pilots(done.opened.sites)
    assert 0 < len(whole) < len(counts) / 2
    assert max(counts[name] for name in counts if name not in whole) < 0.7 * min(counts[name] for name in whole)
    # A saved profile holds no site back.
    assert min(every.values()) >= min(counts[name] for name in whole)
