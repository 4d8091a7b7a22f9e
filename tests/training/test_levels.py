"""Training through rounding, and values that weights share."""

import copy

import pytest
import torch
from torch import nn

import octavo
from octavo.errors import RequestError
from octavo.forms import Codebook, Grid
from octavo.methods.quantize.rtn import RoundToNearest
from octavo.training import LearnedLevels, QuantizedTraining, accuracy, cross_entropy, distillation, fit
from octavo.training.formed import plain_copy


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 3))


def task() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Which of three directions is the largest."""
    draws = torch.Generator().manual_seed(3)
    x, directions = torch.randn(512, 16, generator=draws), torch.randn(16, 3, generator=draws)
    return list(zip(x.split(64), (x @ directions).argmax(1).split(64), strict=True))


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    model = net()
    fit(model, lambda epoch: task(), cross_entropy, epochs=20, lr=1e-2)
    return model.requires_grad_(False)


def test_gradients_are_those_of_what_the_levels_share():
    """The identity of differentiable quantization: a value's gradient is the sum over its members."""
    layer = nn.Linear(6, 4, bias=False)
    LearnedLevels(3).begin(layer, 1)
    x = torch.randn(5, 6)
    (layer(x) ** 2).sum().backward()
    levels, weight = layer.parametrizations.weight[0], layer.parametrizations.weight.original
    whole = nn.Linear(6, 4, bias=False)
    whole.load_state_dict({"weight": layer.weight.detach()})
    (whole(x) ** 2).sum().backward()
    order = levels.values.detach().sort().indices
    codes = levels.form(weight.detach()).codes
    summed = torch.stack([whole.weight.grad[codes == k].sum() for k in range(3)])
    assert torch.allclose(levels.values.grad[order], summed, atol=1e-5)
    # The weights have the gradient of the identity.
    assert torch.allclose(weight.grad, whole.weight.grad, atol=1e-6)


def test_values_alone_train_while_weights_stay(dense):
    model, regimen = copy.deepcopy(dense), LearnedLevels(4, weights=False)
    regimen.begin(model, 1)
    before = accuracy(model, task())
    values = model[0].parametrizations.weight[0].values.detach().clone()
    model = copy.deepcopy(dense).requires_grad_(True)
    fit(model, lambda epoch: task(), distillation(dense, temperature=2.0), epochs=15, lr=3e-3, regimen=regimen)
    assert torch.equal(model[0].parametrizations.weight.original, dense[0].weight)
    assert not torch.equal(model[0].parametrizations.weight[0].values, values)
    assert accuracy(model, task()) > before


def test_a_frozen_weight_stays_frozen():
    model = net()
    model[0].weight.requires_grad_(False)
    LearnedLevels().begin(model, 1)
    assert not model[0].parametrizations.weight.original.requires_grad
    assert model[2].parametrizations.weight.original.requires_grad


def test_zeros_of_a_pruned_model_stay():
    model = net()
    with torch.no_grad():
        model[0].weight[model[0].weight.abs() < 0.1] = 0
    zeros, regimen = model[0].weight == 0, LearnedLevels(5, places="linear", zeros=True)
    fit(model, lambda epoch: task(), cross_entropy, epochs=3, lr=1e-2, regimen=regimen)
    form = regimen.forms(model)["0.weight"]
    assert isinstance(form, Codebook) and len(form.values) == 5
    assert torch.equal(form.dense() == 0, zeros)
    assert torch.equal(form.dense(), model[0].weight.detach())


def test_a_matrix_of_zeros_and_one_of_one_value_have_levels():
    for value in (0.0, 0.5):
        model, regimen = net(), LearnedLevels(4, zeros=True)
        nn.init.constant_(model[0].weight, value)
        regimen.begin(model, 1)
        assert torch.equal(regimen.forms(model)["0.weight"].dense(), torch.full((48, 16), value))


def test_training_through_rounding_beats_rounding_afterwards(dense, tmp_path):
    setting = {"bits": 2, "group": "row"}
    after, seen = (QuantizedTraining(setting=setting, names=("0.*",)) for _ in range(2))
    rounded, model = copy.deepcopy(dense), copy.deepcopy(dense).requires_grad_(True)
    after.begin(rounded, 1)
    lesson = distillation(dense, cross_entropy, temperature=2.0)
    fit(model, lambda epoch: task(), lesson, epochs=15, lr=3e-3, regimen=seen)
    assert accuracy(model, task()) > accuracy(rounded, task())
    forms = seen.forms(model)
    assert list(forms) == ["0.weight"] and isinstance(forms["0.weight"], Grid)
    octavo.save((model, seen.hand_over(model)), tmp_path / "out", report=False)
    read = octavo.load(tmp_path / "out", into=net(5))
    plain = plain_copy(model, forms)
    assert torch.allclose(read(task()[0][0]), plain(task()[0][0]), atol=1e-5)


def test_a_method_with_its_knobs_rounds():
    model, regimen = net(), QuantizedTraining(RoundToNearest(symmetric=True), {"bits": 3, "group": 8})
    regimen.begin(model, 1)
    assert all(form.zero is None for form in regimen.forms(model).values())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LearnedLevels(1), "levels is 1"),
        (lambda: LearnedLevels(257), "from 2 to 256"),
        (lambda: LearnedLevels(places="anywhere"), "quantiles, linear"),
        (lambda: LearnedLevels(names=("9.*",)).begin(net(), 1), "no weight '9"),
        (lambda: LearnedLevels().forms(net()), "nothing was trained yet in this Sequential"),
        (lambda: QuantizedTraining().forms(net()), "nothing was trained yet in this Sequential"),
        (lambda: [LearnedLevels().begin(model, 1) for model in [net()] * 2], "no other regimen computes"),
        (lambda: QuantizedTraining("no-such").begin(net(), 1), "no-such"),
        (lambda: QuantizedTraining(setting={"bits": 4, "grup": 8}).begin(net(), 1), "'grup' is not a setting"),
        (lambda: QuantizedTraining(setting={"bits": 99, "group": 8}).begin(net(), 1), "bits is 99"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(RequestError, match=said):
        make()
