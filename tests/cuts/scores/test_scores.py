"""What scores say of units, against their formulas."""

import pytest
import torch
from torch import nn

from octavo.calibration.curvature import kronecker
from octavo.calibration.objective import Loss, Squared
from octavo.cuts import SCORES, Slice, Units
from octavo.cuts.layers import layer_units
from octavo.cuts.readers import gated
from octavo.cuts.scores.activation import Activation
from octavo.cuts.scores.gradients import Fisher, OptimalBrainSurgeon, Taylor
from octavo.cuts.scores.magnitude import NormScale, WeightMagnitude
from octavo.errors import RequestError

GENERATOR = torch.Generator().manual_seed(2)
BATCHES = list(torch.randn(12, 5, generator=GENERATOR).split(4))


def net_of():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3, bias=False))


#: Pairs of neurons: what goes is two rows, two entries of a bias, and two columns.
PLACES = torch.arange(6).view(3, 2)
PAIRS = Units(
    "0", "pair", 3, (Slice("0.weight", 0, PLACES), Slice("0.bias", 0, PLACES), Slice("2.weight", 1, PLACES))
)  # fmt: skip


def loss_of(module, batch):
    return module(batch).square().sum(1) + module(batch)[:, 0]


def found(score, net, units=(PAIRS,), objective=None):
    seen = score.observe(net, list(units), BATCHES, objective or Loss(loss_of))
    return score.scores(net, list(units), seen)[units[0].name]


def example_gradients(net):
    """Gradients of both weights for every example."""
    rows = []
    for row in torch.cat(BATCHES):
        net.zero_grad()
        loss_of(net, row[None]).sum().backward()
        rows.append((net[0].weight.grad.clone(), net[0].bias.grad.clone(), net[2].weight.grad.clone()))
    return rows


def test_taylor_is_the_square_of_weights_times_gradients():
    net = net_of()
    expected = torch.stack(
        [(grads[2] * net[2].weight).sum(0)[PLACES].sum(1).square() for grads in example_gradients(net)]
    )
    assert torch.allclose(found(Taylor(), net).float(), expected.mean(0).detach(), rtol=1e-4)
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_fisher_sums_over_all_that_hangs_on_a_unit():
    net = net_of()
    # One example in a batch: the square of the gradient is exact.
    score = Fisher()
    seen = score.observe(net, [PAIRS], list(torch.cat(BATCHES).split(1)), Loss(loss_of))
    sums = [torch.zeros(3) for _ in range(3)]
    for own, bias, reader in example_gradients(net):
        sums[0] += (own.square() * net[0].weight.detach().square()).sum(1)[PLACES].sum(1)
        sums[1] += (bias.square() * net[0].bias.detach().square())[PLACES].sum(1)
        sums[2] += (reader.square() * net[2].weight.detach().square()).sum(0)[PLACES].sum(1)
    assert torch.allclose(score.scores(net, [PAIRS], seen)["0"].float(), sum(sums) / 12 / 2, rtol=1e-4)


def test_the_optimal_brain_surgeon_takes_the_inverse_of_the_curvature():
    moment = torch.randn(4, 4, generator=GENERATOR)
    curvature = kronecker(torch.eye(3), moment @ moment.t())
    full = torch.kron(torch.eye(3), moment @ moment.t()) + 0.1 * torch.eye(12)
    expected = torch.linalg.inv(full).diagonal().view(3, 4)
    assert torch.allclose(curvature.inverse_diagonal(0.1), expected, rtol=1e-3)
    net = net_of()
    values = found(OptimalBrainSurgeon(), net, objective=Squared())
    assert values.shape == (3,) and bool((values > 0).all())
    with torch.no_grad():
        net[2].weight[:, 2:4] *= 3
    assert float(found(OptimalBrainSurgeon(), net, objective=Squared())[1]) > float(values[1])


@pytest.mark.parametrize("sequence", ["mean", "l2", "variance"])
@pytest.mark.parametrize("batch", ["mean", "l2", "variance"])
def test_activations_are_aggregated_over_positions_and_then_over_sequences(sequence, batch):
    net, flow = net_of(), torch.randn(6, 7, 5, generator=GENERATOR)
    neurons = Units("0", "neuron", 6, (Slice("2.weight", 1, torch.arange(6)[:, None]),))
    inner = torch.tanh(net[0](flow)).detach().double()

    def over(values, how, dim):
        if how == "mean":
            return values.abs().mean(dim)
        return values.square().mean(dim).sqrt() if how == "l2" else values.var(dim, correction=0)

    score = Activation(sequence, batch)
    seen = score.observe(net, [neurons], list(flow.split(2)), Squared())
    expected = over(over(inner, sequence, 1), batch, 0)
    assert torch.allclose(score.scores(net, [neurons], seen)["0"], expected, rtol=1e-4)


def test_a_layer_is_worth_how_much_it_turns_the_stream():
    class Adding(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.inner, self.size = nn.Linear(5, 5), size

        def forward(self, hidden_states):
            return hidden_states + self.size * self.inner(hidden_states)

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Adding(size) for size in (0.5, 0.0, 2.0))

        def forward(self, flow):
            for layer in self.layers:
                flow = layer(flow)
            return flow

    torch.manual_seed(0)
    stack = Stack()
    units = layer_units(stack, "layers")
    for score in (Activation(), Taylor()):
        values = score.scores(stack, [units], score.observe(stack, [units], BATCHES, Squared()))["layers:layer"]
        assert float(values[1]) == pytest.approx(0, abs=1e-12) and float(values[2]) > float(values[0]) > 0


def test_magnitudes_do_not_change_where_scales_move_from_writer_to_reader():
    net = net_of()
    before = found(WeightMagnitude(), net)
    with torch.no_grad():
        net[0].weight[:2] *= 5
        net[2].weight[:, :2] /= 5
    assert torch.allclose(found(WeightMagnitude(), net), before, rtol=1e-5)
    with torch.no_grad():
        net[2].weight[:, 4:] = 0
    assert float(found(WeightMagnitude(), net)[2]) == 0


def test_norm_scales_need_a_norm():
    net = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    nn.init.normal_(net[1].weight)
    places = torch.arange(6)[:, None]
    units = Units("0", "neuron", 6, (Slice("0.weight", 0, places), Slice("1.weight", 0, places)))
    assert torch.allclose(NormScale().scores(net, [units], None)["0"].float(), net[1].weight.detach().abs())
    with pytest.raises(RequestError, match="no norm scales the units '0'; choose another score"):
        NormScale().scores(net_of(), [PAIRS], None)


@pytest.mark.parametrize("name", ["activation", "fisher", "taylor"])
def test_data_are_needed(name):
    with pytest.raises(RequestError, match="nothing to observe; give at least one batch"):
        SCORES.get(name)().observe(net_of(), [PAIRS], [], Squared())


def test_every_score_is_finite_and_takes_any_units():
    net = net_of()
    for name, cls in SCORES.all().items():
        if name in ("norm-scale", "usage"):
            continue
        values = found(cls(), net, objective=Squared())
        assert values.shape == (3,) and bool(torch.isfinite(values).all()), name


def test_aggregations_that_are_not_known_are_refused():
    with pytest.raises(RequestError, match="sequence is 'max'; choose one of mean, l2, variance"):
        Activation(sequence="max")


@pytest.mark.parametrize(("device", "dtype"), [("meta", torch.float32), ("cpu", torch.bfloat16)])
def test_gates_act_where_and_as_precisely_as_the_model_runs(device, dtype):
    net, gates = net_of().to(device, dtype), {"0": torch.ones(4, 3, requires_grad=True)}
    x = torch.ones(4, 5, device=device, dtype=dtype)
    with gated(net, [PAIRS], gates):
        result = net(x)
    assert (result.device.type, result.dtype) == (device, dtype)
    # Tensors of the device "meta" have no values.
    if device == "cpu":
        assert torch.equal(result, net(x))
        result.sum().backward()
        assert gates["0"].grad.shape == (4, 3) and gates["0"].grad.dtype == torch.float32
