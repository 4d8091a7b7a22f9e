"""The straight-through factorizer: what the network runs with, where gradients go, and what is left of it."""

import copy

import pytest
import torch
from torch import nn

from octavo.errors import RequestError
from octavo.forms import DenseSparse
from octavo.methods.factorize.dictionaries import Shape, learn, split
from octavo.recipes.frame import through_file
from octavo.sources.sites import Layout
from octavo.training import Regimen, accuracy, cross_entropy, fit, formed, settle
from octavo.training.regimens.dsformer import StraightThroughFactorizer

SHAPE = Shape(8, 12, 2)


def task():
    torch.manual_seed(0)
    x = torch.randn(768, 24)
    y = torch.tanh(x @ torch.randn(24, 24) / 3) @ torch.randn(24, 6)
    return lambda epoch: [(x[i : i + 64], y[i : i + 64].argmax(1)) for i in range(0, 768, 64)]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 6))


def test_the_network_sees_the_product_and_the_shadow_gets_its_gradient():
    model, plain = net(), net()
    regimen = StraightThroughFactorizer({"0.weight": SHAPE})
    regimen.begin(model, 1)
    product = learn(split(plain[0].weight.detach(), 8), SHAPE, 8).form(24).dense()
    assert torch.allclose(model[0].weight, product, atol=1e-6)
    plain[0].weight.data = product
    batch = task()(0)[0]
    for module in (model, plain):
        cross_entropy(module, batch).backward()
    shadow = model[0].parametrizations.weight.original
    assert torch.allclose(shadow.grad, plain[0].weight.grad, atol=1e-6)
    assert torch.equal(shadow, net()[0].weight) and not torch.equal(shadow, product)


def test_supports_move_while_it_trains_and_the_shadow_is_dropped():
    model, regimen = net(), StraightThroughFactorizer({"0.weight": SHAPE})
    losses = fit(model, task(), cross_entropy, epochs=15, lr=1e-2, regimen=regimen)
    forms = regimen.forms(model)
    form = forms["0.weight"]
    assert losses[-1] < losses[0] / 2
    assert isinstance(form, DenseSparse) and isinstance(model[0].weight, nn.Parameter)
    assert torch.equal(model[0].weight, form.dense()) and dict(model.named_parameters()).keys() == {
        "0.weight", "0.bias", "2.weight", "2.bias"
    }  # fmt: skip
    first = learn(split(net()[0].weight.detach(), 8), SHAPE, 8).form(24)
    assert float((first.index != form.index).float().mean()) > 0.2
    assert torch.equal(regimen.forms(model)["0.weight"].dense(), form.dense())
    stored = through_file(model, forms)
    assert torch.allclose(stored.load(net())[0].weight, form.dense(), atol=2e-3)


def test_forms_leave_copies_as_they_are():
    model, regimen, x = net(), StraightThroughFactorizer({"0.weight": SHAPE}), task()(0)[0][0]
    regimen.begin(model, 1)
    other = copy.deepcopy(model)
    before = other(x)
    regimen.forms(model)
    assert torch.equal(other(x), before)
    assert isinstance(model[0].weight, nn.Parameter) and not isinstance(other[0].weight, nn.Parameter)


def test_it_learns_what_a_factorization_afterwards_loses():
    batches = task()
    dense, factorized = net(), net()
    fit(dense, batches, cross_entropy, epochs=20, lr=1e-2)
    state = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    factorized.load_state_dict(state)
    dense[0].weight.data = learn(split(state["0.weight"], 8), Shape(8, 12, 1), 8).form(24).dense()
    regimen = StraightThroughFactorizer({"0.weight": Shape(8, 12, 1)})
    fit(factorized, batches, cross_entropy, epochs=8, lr=1e-2, regimen=regimen)
    forms = regimen.forms(factorized)
    found = [accuracy(module, batches(0)) for module in (dense, factorized)]
    assert found[1] > found[0] + 0.05
    # A tail with fixed supports takes the forms up as they are.
    formed(factorized, forms)
    fit(factorized, batches, cross_entropy, epochs=2, lr=1e-3, regimen=Regimen())
    tail = settle(factorized)["0.weight"]
    assert torch.equal(tail.index, forms["0.weight"].index)
    assert accuracy(factorized, batches(0)) > found[0]


def test_wide_matrices_are_read_the_other_way_round():
    model = nn.Sequential(nn.Linear(48, 10))
    layouts = {"0.weight": Layout("columns_first")}
    regimen = StraightThroughFactorizer({"0.weight": Shape(5, 16, 2)}, layouts)
    regimen.begin(model, 1)
    form = regimen.forms(model)["0.weight"]
    assert form.shape == (48, 10) and torch.equal(model[0].weight, form.dense().t())
    assert through_file(model, {"0.weight": form}, layouts=layouts).bytes > 0


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("7.weight", SHAPE, "no parameter '7.weight'"),
        ("0.weight", Shape(25, 12, 2), "48 x 24"),
        ("0.weight", Shape(8, 49, 2), "atoms up to the 48 rows"),
        ("0.weight", Shape(8, 12, 13), "nonzeros up to"),
        ("0.weight", Shape(8, 12, 0), "nonzeros up to"),
    ],
)
def test_shapes_that_do_not_fit_are_told(name, shape, message):
    with pytest.raises(RequestError, match=message):
        StraightThroughFactorizer({name: shape}).begin(net(), 1)
