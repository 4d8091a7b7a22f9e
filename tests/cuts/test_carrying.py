"""Channels that are constant are carried: without them the model computes the same."""

import pytest
import torch
from torch import nn

from octavo.cuts import Slice, Units, without
from octavo.cuts.carrying import by_norms, carry
from octavo.errors import RequestError


class Net(nn.Module):
    """Three convolutions; the second is normalized and the third has a bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.second, self.other = nn.Conv2d(6, 5, 3, bias=False), nn.BatchNorm2d(5)
        self.third = nn.Conv2d(5, 3, 1)
        for norm in (self.norm, self.other):
            nn.init.uniform_(norm.running_mean)
            nn.init.uniform_(norm.bias, 0.5, 1.5)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        return self.third(nn.functional.silu(self.other(self.second(x))))


def units():
    found = []
    for name, norm, reader, count in (("first", "norm", "second", 6), ("second", "other", "third", 5)):
        places = torch.arange(count)[:, None]
        leaves = [f"{norm}.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")]
        slices = [Slice(leaf, 0, places) for leaf in (f"{name}.weight", *leaves)]
        found.append(Units(f"{name}:channel", "channel", count, (*slices, Slice(f"{reader}.weight", 1, places))))
    return found


def masks():
    return {"norm": torch.tensor([1, 0, 1, 1, 0, 1]).bool(), "other": torch.tensor([0, 1, 1, 1, 0]).bool()}


def test_constant_channels_go_without_a_trace():
    model, x = Net().eval(), torch.randn(4, 2, 9, 9)
    with torch.no_grad():
        for name, mask in masks().items():
            model.get_submodule(name).weight[~mask] = 0
        kept = by_norms(units(), masks())
        before, expected = {k: v.clone() for k, v in model.state_dict().items()}, model(x)
        carried = without(carry(model, units(), kept, [x[:2], x[2:]]), units(), kept)
        bare = without(model, units(), kept)
        assert carried.second.weight.shape == (3, 4, 3, 3) and not carried.training
        assert torch.allclose(carried(x), expected, atol=1e-5)
        assert float((bare(x) - expected).norm()) > 0.1 * float(expected.norm())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_norm_without_running_statistics_takes_constants_out_by_itself():
    torch.manual_seed(0)
    second = nn.Conv2d(4, 5, 3, bias=False)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), second, nn.BatchNorm2d(5, track_running_stats=False), nn.ReLU()
    ).eval()
    places, kept, x = torch.arange(4)[:, None], {"0": torch.tensor([True, False, True, True])}, torch.randn(4, 2, 9, 9)
    names = (("0.weight", 0), ("0.bias", 0), ("2.weight", 1))
    part = Units("0", "channel", 4, tuple(Slice(name, dim, places) for name, dim in names))
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0, 2.0
        carried = without(carry(model, [part], kept, [x]), [part], kept)
        assert carried[2].in_channels == 3 and torch.allclose(carried(x), model(x), atol=1e-5)


def test_means_are_kept_where_images_are_padded():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    model = nn.Sequential(nn.Conv2d(1, 4, 1), norm, nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1)).eval()
    nn.init.uniform_(norm.bias, 0.5, 1.5)
    places, x = torch.arange(4)[:, None], torch.randn(8, 1, 4, 4)
    names = ("0.weight", "0.bias", *(f"1.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")))
    part = Units("0", "channel", 4, (*(Slice(name, 0, places) for name in names), Slice("3.weight", 1, places)))
    kept = {"0": torch.tensor([True, False, True, False])}
    with torch.no_grad():
        thinner = without(carry(model, [part], kept, [x]), [part], kept)
        assert torch.allclose(thinner(x).mean((0, 2, 3)), model(x).mean((0, 2, 3)), atol=1e-5)


def test_coupled_channels_stay_if_one_normalization_keeps_them():
    places = torch.arange(3)[:, None]
    part = Units("stream", "channel", 3, tuple(Slice(f"{name}.weight", 0, places) for name in ("a", "b", "conv")))
    kept = {"a": torch.tensor([True, False, False]), "b": torch.tensor([False, False, True])}
    assert by_norms([part], kept)["stream"].tolist() == [True, False, True]


def test_bad_requests_are_told():
    with pytest.raises(RequestError, match="'late' scales no unit"):
        by_norms(units(), {**masks(), "late": torch.ones(3).bool()})
    kept = by_norms(units(), masks())
    with pytest.raises(RequestError, match="was not used by any batch"):
        carry(Net(), units(), kept, [])
    with pytest.raises(RequestError, match="no channel of 'first:channel' is left"):
        carry(Net(), units(), {"first:channel": torch.zeros(6).bool()}, [torch.randn(1, 2, 9, 9)])
