"""Entropy of activations, and the blocks of layers that it joins."""

import math

import pytest
import torch
from torch import nn

from octavo.calibration.entropy_blocks import activation_entropies, entropy_blocks
from octavo.errors import RequestError


class Chain(nn.Module):
    """Layers that change how evenly values lie: as they are, cubed, and with an outlier."""

    def __init__(self) -> None:
        super().__init__()
        self.even, self.cubed = nn.Identity(), nn.Module()
        self.cubed.forward = lambda x: x**3

    def forward(self, x):
        return self.cubed(self.even(x))


@pytest.fixture
def batches():
    torch.manual_seed(0)
    return [torch.randn(4, 50, 8) for _ in range(2)]


def test_heavier_tails_have_less_entropy(batches):
    found = activation_entropies(Chain(), ["even", "cubed"], batches)
    assert 1 > found["even"] > found["cubed"] > 0


def test_scale_and_offset_of_channels_do_not_count(batches):
    moved = [batch * torch.logspace(-3, 3, 8) + 5 for batch in batches]
    plain, other = (activation_entropies(Chain(), ["even"], given)["even"] for given in (batches, moved))
    assert math.isclose(plain, other, rel_tol=1e-3)


def test_entropy_of_known_values():
    # Deviations of 3, 1, 1 and 1 from the mean: p = 1/2, 1/6, 1/6, 1/6.
    wanted = (0.5 * math.log(2) + 0.5 * math.log(6)) / math.log(4)
    values = torch.tensor([[3.0], [-1.0], [-1.0], [-1.0]])
    assert math.isclose(activation_entropies(Chain(), ["even"], [values])["even"], wanted, rel_tol=1e-6)
    assert activation_entropies(Chain(), ["even"], [torch.ones(5, 3)])["even"] == 0


def test_blocks_follow_the_running_mean_and_end_at_the_depth():
    assert entropy_blocks({"a": 0.5, "b": 0.9, "c": 0.6, "d": 0.5}) == [("a",), ("b", "c"), ("d",)]
    rising = {name: float(number) for number, name in enumerate("abcdefg")}
    assert entropy_blocks(rising) == [("a",), ("b", "c", "d"), ("e", "f", "g")]
    assert entropy_blocks(rising, deepest=1) == [(name,) for name in rising]
    assert entropy_blocks({}) == []


def test_the_model_is_as_before():
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), nn.ReLU())
    net[1].eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    found = [activation_entropies(net, ["2"], [5 + torch.arange(32.0).view(8, 4)]) for _ in range(2)]
    assert found[0] == found[1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert [part.training for part in net.modules()] == [True, True, False, True]


@pytest.mark.parametrize(
    ("layers", "batch", "said"),
    [
        (["none"], torch.ones(2, 3), "has no layer 'none'"),
        (["even"], torch.full((2, 3), math.nan), "not finite"),
        (["even"], torch.ones(3), "returns no"),
    ],
)
def test_bad_input_is_named(layers, batch, said):
    with pytest.raises(RequestError, match=said):
        activation_entropies(Chain(), layers, [batch])
    with pytest.raises(RequestError, match="did not run"):
        activation_entropies(Chain(), ["even"], [])
    with pytest.raises(RequestError, match="deepest"):
        entropy_blocks({"a": 1.0}, deepest=0)
