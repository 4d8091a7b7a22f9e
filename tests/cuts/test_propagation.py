"""Relevance: conserved from layer to layer, equal to the published rule, and higher for what matters."""

import doctest

import pytest
import torch
from torch import nn
from torch.nn import functional

import octavo.cuts.propagation
from octavo.calibration.objective import KL
from octavo.cuts import Slice, Units
from octavo.cuts.propagation import propagated
from octavo.cuts.scores.relevance import Relevance
from octavo.errors import RequestError


def test_examples_say_what_happens():
    assert doctest.testmod(octavo.cuts.propagation, extraglobs={"torch": torch, "nn": nn}).failed == 0


class Residual(nn.Module):
    """Convolutions, batch norms that were trained, pooling, and a sum."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.first, self.norm1 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.norm2 = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(6, 3)

    def forward(self, x):
        x = self.pool(functional.relu(self.norm(self.stem(x))))
        y = self.norm2(self.second(functional.relu(self.norm1(self.first(x)))))
        return self.head(functional.relu(x + y).mean((2, 3)))


def residual():
    torch.manual_seed(0)
    net = Residual()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net.train()


def examples(count=12, *shape, classes=3):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, classes, (count,), generator=generator)
    return torch.randn(count, *shape, generator=generator), labels


def test_relevance_is_conserved():
    """All that begins at the classes arrives at the inputs, and passes every layer that nothing leads around."""
    net, (x, y) = residual(), examples(12, 2, 8, 8)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    found = propagated(net, [(x[:5], y[:5]), (x[5:], y[5:])])
    assert found.arrived == pytest.approx(1, abs=1e-3)
    assert float(found.outputs["head"].sum()) == pytest.approx(12, rel=1e-4)
    assert torch.allclose(found.outputs["head"], y.bincount(minlength=3).float(), atol=1e-4)
    assert {name: len(value) for name, value in found.outputs.items()} == {
        "stem": 6, "first": 8, "second": 6, "head": 3
    }  # fmt: skip
    assert net.training and all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_in_a_chain_every_layer_has_all_propagated():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 5, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(5, 4, 2), nn.ReLU(), nn.Flatten(), nn.Dropout(),
        nn.Linear(64, 7), nn.ReLU(), nn.Linear(7, 4),
    )  # fmt: skip
    x, y = examples(9, 1, 12, 12, classes=4)
    for layer in (net[0], net[3], net[7], net[9]):
        # Every output has a positive contribution, and nothing else explains it.
        layer.bias.data.zero_(), layer.weight.data.abs_()
    found = propagated(net, [(x.abs(), y)])
    assert found.arrived == pytest.approx(1, abs=1e-4)
    for name in ("0", "3", "7", "9"):
        assert float(found.outputs[name].sum()) == pytest.approx(9, rel=1e-3)


def test_the_rule_is_the_published_one():
    """Two layers by hand; the second has inputs that are not negative, the first has negative ones, too."""
    torch.manual_seed(0)
    first, second = nn.Linear(5, 6).requires_grad_(False), nn.Linear(6, 3).requires_grad_(False)
    x, y = examples(4, 5)
    hidden = functional.relu(first(x))
    part = hidden[:, None] * second.weight.clamp_min(0)
    share = part / (part.sum(2, keepdim=True) + 1e-12)
    of_hidden = share[torch.arange(4), y]
    found = propagated(nn.Sequential(first, nn.ReLU(), second), [(x, y)])
    assert torch.allclose(found.outputs["0"], of_hidden.sum(0), atol=1e-5)
    both = (x[:, None] * first.weight).clamp_min(0)
    at_inputs = (both / (both.sum(2, keepdim=True) + 1e-12) * of_hidden[:, :, None]).sum((1, 2))
    assert found.arrived == pytest.approx(float(at_inputs.sum() / 4), abs=1e-4)


def hidden(name, layer, reader, count):
    places = torch.arange(count)[:, None]
    return Units(name, "channel", count, (Slice(f"{layer}.weight", 0, places), Slice(f"{reader}.weight", 1, places)))


def test_scores_of_units():
    net, (x, y) = residual(), examples(6, 2, 8, 8)
    places = torch.arange(6)[:, None]
    stream = Units("stream", "channel", 6, tuple(Slice(f"{name}.weight", 0, places) for name in ("stem", "second")))
    units = [hidden("block", "first", "second", 8), stream]
    seen = Relevance().observe(net, units, [(x, y)], KL())
    scores = Relevance().scores(net, units, seen)
    assert float(scores["block"].sum()) == pytest.approx(1) and float(scores["stream"].sum()) == pytest.approx(1)
    plain = Relevance(normalize=False).scores(net, units, seen)["block"]
    assert torch.equal(plain.float(), seen.outputs["first"]) and float(plain.sum()) < 6
    with pytest.raises(RequestError, match="writes the units 'odd'"):
        Relevance().scores(net, [Units("odd", "row", 2, (Slice("norm.weight", 0, places[:2]),))], seen)


def test_without_labels_the_decisions_of_the_net_are_traced():
    net, (x, _) = residual().eval(), examples(6, 2, 8, 8)
    assert torch.equal(propagated(net, [x]).outputs["first"], propagated(net, [(x, net(x).argmax(1))]).outputs["first"])


def test_neurons_that_decide_have_more_propagated():
    """One neuron per class sees its input, the others see noise and hardly count."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        net[0].weight.mul_(0.1).view(-1)[[0, 5]] = 3.0
        net[2].weight.mul_(0.1)[[0, 1], [0, 1]] = 2.0
    y = torch.tensor([0, 1] * 20)
    x = torch.rand(40, 4)
    x[torch.arange(40), y] += 1
    values = propagated(net, [(x, y)]).outputs["0"]
    assert float(values[:2].min()) > 5 * float(values[2:].max())


@pytest.mark.parametrize(
    ("net", "says"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)), r"'1' \(LayerNorm\)"),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 2)), "batch norm '2' follows no"),
    ],
)
def test_nets_for_which_the_rule_does_not_hold_are_refused(net, says):
    with pytest.raises(RequestError, match=says):
        propagated(net, [examples(3, 4, classes=2)])


def test_no_examples_are_refused():
    with pytest.raises(RequestError, match="nothing to observe"):
        propagated(nn.Linear(4, 2), [])
    with pytest.raises(RequestError, match=r"the inputs are \{input_ids"):
        propagated(nn.Linear(4, 2), [{"input_ids": torch.ones(1, 3)}])
