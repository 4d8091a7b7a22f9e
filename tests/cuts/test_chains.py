"""Units of plain chains: what goes with each, and nets that are no chains."""

import doctest

import pytest
import torch
from torch import nn

import octavo.cuts.chains
from octavo.cuts import without
from octavo.cuts.chains import chain_units
from octavo.errors import RequestError


def test_examples_say_what_happens():
    assert doctest.testmod(octavo.cuts.chains, extraglobs={"torch": torch, "nn": nn}).failed == 0


def test_a_chain_computes_the_same_without_units_that_are_zero():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Conv2d(5, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.ReLU(),
        nn.Linear(6, 3),
    ).eval()  # fmt: skip
    units = chain_units(net)
    assert [(part.name, part.count) for part in units] == [("0.0", 5), ("1", 4), ("4", 6)]
    kept = {part.name: torch.arange(part.count) % 2 == 0 for part in units}
    with torch.no_grad():
        for part in units:
            reads = part.slices[-1]
            net.get_parameter(reads.tensor)[:, reads.places[~kept[part.name]].flatten()] = 0
    thin, images = without(net, units, kept), torch.randn(3, 2, 10, 10)
    assert thin[0][1].num_features == 3 and thin[4].in_features == 32
    assert torch.allclose(thin(images), net(images), atol=1e-5)


@pytest.mark.parametrize(
    ("net", "says"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), r"'1' \(LayerNorm\) is not a link"),
        (nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2)), r"'1' \(Conv2d\) is not a link"),
        (nn.Sequential(nn.Linear(3, 4)), "no two layers"),
    ],
)
def test_what_is_no_chain_is_refused(net, says):
    with pytest.raises(RequestError, match=says):
        chain_units(net)
