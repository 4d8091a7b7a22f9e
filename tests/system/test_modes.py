"""Evaluation mode for a while: every module gets back the mode that it had."""

import pytest
import torch
from torch import nn

from octavo.cuts import Slice, Units
from octavo.cuts.carrying import carry
from octavo.cuts.structured import Structured
from octavo.system.modes import evaluating
from octavo.training import accuracy, distillation
from octavo.training.n2n import lessons
from octavo.training.teaching import Lesson, Logits
from octavo.training.widths import recalibrate

X, LABELS = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


def mixed():
    """A network in training whose normalization is not, as when its statistics are frozen."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
    net[1].eval()
    return net


def modes(net):
    return [part.training for part in net.modules()]


def carried(net):
    places = torch.arange(6)[:, None]
    units = [Units("0", "neuron", 6, (Slice("0.weight", 0, places), Slice("3.weight", 1, places)))]
    assert modes(carry(net, units, {"0": torch.arange(6) < 4}, [X])) == modes(net)


#: What runs a module in evaluation mode.
USES = {
    "accuracy": lambda net: accuracy(net, [(X, LABELS)]),
    "recalibrate": lambda net: recalibrate(net, [X]),
    "carry": carried,
    "structured": lambda net: Structured(kinds=("channel",))._objective(net, [X]),
    "lessons of n2n": lambda net: lessons(net, [X]),
    "distillation": lambda net: distillation(net)(mixed(), X),
    "lesson": lambda net: Lesson(net, [Logits()])(mixed(), X),
}


@pytest.mark.parametrize("name", USES)
def test_modes_and_gradients_are_as_before(name):
    net = mixed()
    before = modes(net)
    USES[name](net)
    assert modes(net) == before == [True, True, False, True, True]
    assert all(weight.requires_grad for weight in net.parameters())


def test_modes_come_back_after_an_error_and_after_a_change_inside():
    net = mixed()
    before = modes(net)
    with pytest.raises(ZeroDivisionError), evaluating(net):
        assert not any(modes(net))
        net[1].train()
        raise ZeroDivisionError
    assert modes(net) == before


def test_a_frozen_normalization_is_recalibrated_without_the_noise_of_dropout():
    net = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4))
    recalibrate(net, [X])
    assert torch.allclose(net[1].running_mean, X.mean(0), atol=1e-6)
