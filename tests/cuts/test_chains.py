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


def test_a_norm_behind_a_flattened_image_loses_all_places_of_a_channel():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.BatchNorm1d(144), nn.Linear(144, 3)).eval()
    nn.init.normal_(net[2].running_mean)
    nn.init.uniform_(net[2].weight)
    (part,) = chain_units(net)
    kept, reads = torch.tensor([True, False, True, True]), part.slices[-1]
    with torch.no_grad():
        net[3].weight[:, reads.places[~kept].flatten()] = 0
    thin, images = without(net, [part], {part.name: kept}), torch.randn(2, 1, 8, 8)
    assert thin[2].num_features == thin[3].in_features == 108
    assert torch.allclose(thin(images), net(images), atol=1e-5)


@pytest.mark.parametrize(
    ("net", "says"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), r"'1' \(LayerNorm\) is not a link"),
        (nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2)), r"'1' \(Conv2d\) is not a link"),
        (nn.Sequential(nn.Linear(3, 4)), "no two layers"),
        (
            nn.Sequential(nn.Linear(4, 8), nn.GLU(), nn.Linear(4, 2)),
            r"'2': its 4 features are not .* the 8 neurons of '0'",
        ),
        (nn.Sequential(nn.Conv2d(1, 8, 3), nn.PixelShuffle(2), nn.BatchNorm2d(2)), "'2': its 2 features are not"),
        (nn.Sequential(nn.Conv2d(1, 8, 3), nn.ChannelShuffle(2), nn.Conv2d(8, 2, 3)), r"'1' \(ChannelShuffle\) is not"),
    ],
)
def test_what_is_no_chain_is_refused(net, says):
    with pytest.raises(RequestError, match=says):
        chain_units(net)
