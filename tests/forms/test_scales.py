"""Weights of any scale are compressed as well as those of ordinary size."""

import pytest
import torch
from torch import nn

import octavo

SCALES = [1e-38, 1e-25, 1e25, 1e36]


class Rescaled(nn.Module):
    """Weights of any scale, and outputs of ordinary size."""

    def __init__(self, scale, layer=nn.Linear, dtype=torch.float32):
        super().__init__()
        self.inner, self.outer = layer(64, 64, bias=False, dtype=dtype), nn.Linear(64, 10, dtype=dtype)
        self.scale = scale
        self.inner.weight.data *= scale

    def forward(self, x):
        return self.outer(torch.relu(self.inner(x) / self.scale))


def errors(module, loaded, x):
    with torch.no_grad():
        (old, new), (before, after) = (
            (module.inner.weight / module.scale, loaded.inner.weight / module.scale),
            (module(x), loaded(x)),
        )
    return float((new - old).norm() / old.norm()), float((after - before).square().mean() / before.square().mean())


@pytest.mark.parametrize("preset", ["data-free", "fast", "default"])
@pytest.mark.parametrize("scale", SCALES)
def test_any_scale_of_weights(scale, preset, tmp_path):
    torch.manual_seed(0)
    module, x = Rescaled(scale), torch.randn(64, 64)
    data = {} if preset == "data-free" else {"data": [x], "objective": "squared"}
    done = octavo.compress(module, ratio=4, preset=preset, **data)
    report = done.save(tmp_path / "out")
    weights, outputs = errors(module, octavo.load(tmp_path / "out", into=Rescaled(scale)), x)
    assert weights < 0.08 and outputs < 2e-3
    assert preset == "data-free" or 0 < report["quality"]["value"] < 1e-2
    assert octavo.verify(tmp_path / "out").weights_match


@pytest.mark.parametrize("request_", [{"curvature": "ekfac"}, {"target": "memory"}], ids=["ekfac", "memory"])
def test_other_ways_through(request_, tmp_path):
    torch.manual_seed(0)
    module, x = Rescaled(1e-25), torch.randn(64, 64)
    octavo.compress(module, ratio=3, preset="fast", data=[x], objective="squared", **request_).save(
        tmp_path / "out", report=False
    )
    packed = octavo.load(tmp_path / "out", into=Rescaled(1e-25), packed="target" in request_)
    factors = octavo.load(tmp_path / "out", into=Rescaled(1e-25), factors=True)
    for loaded in (packed, factors):
        weights, outputs = errors(module, loaded, x)
        assert weights < 0.08 and outputs < 0.01


def test_doubles_beyond_single_precision(tmp_path):
    torch.manual_seed(0)
    module, x = Rescaled(1e-200, dtype=torch.float64), torch.randn(64, 64, dtype=torch.float64)
    octavo.compress(module, ratio=6, preset="data-free").save(tmp_path / "out", report=False)
    weights, outputs = errors(module, octavo.load(tmp_path / "out", into=Rescaled(1e-200, dtype=torch.float64)), x)
    assert weights < 0.08 and outputs < 0.01


def test_weights_that_no_output_shows(tmp_path):
    """What a bias hides altogether is stored all the same."""
    torch.manual_seed(0)
    module, data = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), [torch.randn(32, 64)]
    module[0].weight.data *= 1e-25
    done = octavo.compress(module, ratio=4, data=data, preset="fast")
    done.save(tmp_path / "out", report=False)
    assert done.ratio >= 4 and set(octavo.load(tmp_path / "out")) == set(module.state_dict())


def test_convolutions_and_tables(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.ConvTranspose1d(16, 16, 4, groups=2), nn.Embedding(64, 32))
    for part in module:
        part.weight.data *= 1e-20
    octavo.compress(module, ratio=3, preset="data-free").save(tmp_path / "out", report=False)
    for name, weight in octavo.load(tmp_path / "out").items():
        if name.endswith("weight"):
            wanted = module.state_dict()[name]
            assert float((weight - wanted).norm() / wanted.norm()) < 0.15


def test_ordinary_weights_have_no_scale():
    from octavo.sources.source import examine, from_module

    source = from_module(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    source.read("0.weight").mul_(1e-11)
    source.read("1.weight").mul_(1e11)
    examine(source)
    assert all(site.layout.exponent == 0 for site in source.sites()[0])
