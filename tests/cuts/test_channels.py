"""Channels of convolutional networks: groups by residuals and depthwise layers, tried out before they are units."""

import pytest
import torch
from torch import nn

import octavo
from octavo.cuts import best, skeleton, without
from octavo.cuts.structured import Structured
from octavo.errors import RequestError

pytest.importorskip("torch_pruning")


class Residual(nn.Module):
    """A block whose input and output share channels, with a depthwise layer inside."""

    def __init__(self, channels, inside):
        super().__init__()
        self.widen, self.first = nn.Conv2d(channels, inside, 1, bias=False), nn.BatchNorm2d(inside)
        self.each = nn.Conv2d(inside, inside, 3, padding=1, groups=inside)
        self.narrow, self.last = nn.Conv2d(inside, channels, 1), nn.BatchNorm2d(channels)

    def forward(self, flow):
        inner = self.each(torch.relu(self.first(self.widen(flow))))
        return torch.relu(flow + self.last(self.narrow(torch.relu(inner))))


def network(channels=8, inside=(12, 10)):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(), Residual(channels, inside[0]), Residual(channels, inside[1]),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 5),
    )  # fmt: skip
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5), nn.init.normal_(module.running_mean)
    return net.eval()


IMAGES = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_channels_that_a_residual_shares_go_together():
    net = network()
    units = {part.name: part for part in Structured(("channel",), example=IMAGES).units(net)}
    assert {part.count for part in units.values()} == {8, 12, 10}
    shared = next(part for part in units.values() if part.count == 8)
    hanging = {(piece.tensor, piece.dim) for piece in shared.slices}
    assert {("0.weight", 0), ("3.narrow.weight", 0), ("4.last.running_var", 0), ("4.widen.weight", 1)} <= hanging
    # Each channel is four features of the layer after the pooling.
    assert next(piece for piece in shared.slices if piece.tensor == "7.weight").places.shape == (8, 4)
    thinner = without(net, [shared], {shared.name: torch.arange(8) < 5})
    assert thinner(IMAGES).shape == (24, 5) and thinner[7].in_features == 20


def test_depthwise_channels_go_as_zeros_would():
    net = network()
    part = next(p for p in Structured(("channel",), example=IMAGES).units(net) if p.count == 10)
    kept = torch.arange(10) % 3 > 0
    zeroed = network()
    with torch.no_grad():
        zeroed[4].narrow.weight[:, ~kept] = 0
        assert torch.allclose(without(net, [part], {part.name: kept})(IMAGES), zeroed(IMAGES), atol=1e-5)


@pytest.mark.parametrize("score", ["taylor", "norm-scale", "fisher"])
def test_a_convolutional_network_is_cut_to_a_size(score, tmp_path):
    net, cut = network(24, (40, 32)), Structured(score=score)
    done = octavo.compress(net, ratio=1.5, data=IMAGES, methods=[cut], progress=False)
    report = done.save(tmp_path / "thin")
    assert report.artifact.ratio >= 1.5
    again = octavo.load(tmp_path / "thin", into=skeleton(net, octavo.Artifact(tmp_path / "thin").loadable_shapes()))
    assert again.eval()(IMAGES).shape == (24, 5)
    assert sum(t.numel() for t in again.parameters()) < sum(t.numel() for t in net.parameters()) / 1.4


def test_networks_are_traced_with_an_example():
    with pytest.raises(RequestError, match="give a batch, as in"):
        Structured().units(network())
    with pytest.raises(RequestError, match=r"cannot be traced|fails on a batch"):
        Structured(example=torch.randn(2, 4, 8, 8)).units(network())


def test_high_scores_are_worth_more():
    net, reference = network(), network()(IMAGES)
    cut = Structured(("channel",), "taylor", objective="squared", example=IMAGES)
    units, evidence = cut.units(net), cut.observe(net, [IMAGES])
    scores = cut.scores(net, units, evidence)
    lost = [
        float(
            (cut.apply(net, best({n: sign * v for n, v in scores.items()}, 0.3), evidence)(IMAGES) - reference).norm()
        )
        for sign in (1, -1)
    ]
    assert lost[0] < 0.7 * lost[1]
