"""Layers that are low-rank by design."""

import copy

import pytest
import torch
from torch import nn

from octavo.architectures import SequenceClassifier
from octavo.errors import RequestError
from octavo.training import accuracy, cross_entropy, fit
from octavo.training.low_rank import STARTS, low_rank, semi_nmf


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(24 * 16, 40))


def size(module):
    return sum(parameter.numel() for parameter in module.parameters())


IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_a_pair_computes_the_product_of_its_factors():
    model = low_rank(net(), 0.5)
    first, second = model[3]
    assert isinstance(first, nn.Linear) and first.bias is None and second.bias is not None
    x = torch.randn(5, 384)
    assert torch.allclose(model[3](x), x @ (second.weight @ first.weight).t() + second.bias, atol=1e-5)
    wide, point = model[0]
    assert wide.kernel_size == (3, 3) and wide.stride == (2, 2) and point.kernel_size == (1, 1) and point.bias is None
    assert model(IMAGES).shape == (4, 40)


def test_ranks_are_shares_of_the_one_that_breaks_even():
    even = 384 * 40 / (384 + 40)
    assert low_rank(net(), 0.5)[3][0].out_features == round(even / 2)
    assert low_rank(net(), 20)[3][0].out_features == 20
    assert isinstance(low_rank(net(), 37)[3], nn.Linear), "the pair would have more weights"
    assert size(low_rank(net(), 36)) < size(net())


@pytest.mark.parametrize("start", ["svd", "semi-nmf"])
def test_warm_starts_come_near_the_weights(start):
    model = net()
    model[3].weight.data = torch.randn(40, 4) @ torch.rand(4, 384)
    made = low_rank(copy.deepcopy(model), 4, start)
    product = made[3][1].weight @ made[3][0].weight
    assert (product - model[3].weight).norm() < 0.3 * model[3].weight.norm()
    assert torch.equal(made[3][1].bias, model[3].bias)
    kernels = low_rank(copy.deepcopy(model), 0.9, start)[0]
    found = (kernels[1].weight.flatten(1) @ kernels[0].weight.flatten(1)).view_as(model[0].weight)
    assert (found - model[0].weight).norm() < 0.8 * model[0].weight.norm()


def test_svd_is_the_best_start_and_survives_low_rank_and_zeros():
    model = net()
    left, right = (low_rank(copy.deepcopy(model), 10, start)[3] for start in ("svd", "semi-nmf"))
    errors = [(pair[1].weight @ pair[0].weight - model[3].weight).norm().item() for pair in (left, right)]
    tail = torch.linalg.svdvals(model[3].weight.detach())[10:].norm()
    assert errors[0] == pytest.approx(float(tail), rel=1e-4) and errors[0] <= errors[1]
    for start in STARTS:
        model[3].weight.data.zero_()
        pair = low_rank(copy.deepcopy(model), 10, start)[3]
        assert bool(torch.isfinite(pair(torch.randn(3, 384))).all())


def test_semi_nmf_has_one_sign_and_never_gets_worse():
    torch.manual_seed(0)
    weight = torch.randn(30, 5) @ torch.rand(5, 50) + 0.05 * torch.randn(30, 50)
    errors = []
    for iterations in (0, 1, 5, 25, 125):
        f, g = semi_nmf(weight, 5, iterations)
        assert f.shape == (30, 5) and g.shape == (50, 5) and bool((g >= 0).all())
        errors.append(float((weight - f @ g.t()).norm()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.2 * float(weight.norm())


def test_layers_that_cannot_be_thinner_stay():
    grouped = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.MultiheadAttention(16, 2), nn.Linear(3, 2))
    before = [name for name, _ in grouped.named_modules()]
    assert [name for name, _ in low_rank(grouped, 1).named_modules()] != before
    assert isinstance(grouped[0], nn.Conv2d) and grouped[1].out_proj.weight.shape == (16, 16)
    shared = nn.Linear(16, 16)
    twice = low_rank(nn.Sequential(shared, nn.ReLU(), shared), 3)
    assert twice[0] is twice[2]


def test_bad_ranks_and_starts_are_told():
    for rank in (0, -1, 1.5):
        with pytest.raises(RequestError, match="it must be a share below 1 or a whole number"):
            low_rank(net(), rank)
    with pytest.raises(RequestError, match="choose from random, svd, semi-nmf"):
        low_rank(net(), 3, "pca")
    with pytest.raises(RequestError, match="give the module that holds it"):
        low_rank(nn.Linear(9, 9), 3)


def test_a_low_rank_encoder_learns():
    torch.manual_seed(0)
    x, y = torch.randn(256, 8, 6), torch.arange(256) % 4
    x[:, 0] += 3 * nn.functional.one_hot(y, 6)
    model = SequenceClassifier(6, 8, 10, width=32)
    whole = size(model)
    low_rank(model.layers, 8)
    assert size(model) < 0.6 * whole
    fit(model, lambda epoch: list(zip(x.split(32), y.split(32), strict=True)), cross_entropy, epochs=8, lr=1e-2)
    assert accuracy(model, [(x, y)]) > 0.8


def test_a_pair_is_frozen_where_its_layer_was():
    model = net()
    model[3].weight.requires_grad_(False)
    first, second = low_rank(model, 0.5)[3]
    assert [part.requires_grad for part in (first.weight, second.weight, second.bias)] == [False, False, True]
    assert all(part.requires_grad for part in model[0].parameters())


def test_layers_that_share_a_parameter_stay_as_they_are():
    tied = nn.Sequential(nn.Linear(8, 8), nn.Embedding(12, 8), nn.Linear(8, 12))
    tied[2].weight = tied[1].weight
    low_rank(tied, 0.25)
    assert isinstance(tied[0], nn.Sequential)
    assert tied[2].weight is tied[1].weight
    twins = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    twins[1].bias = twins[0].bias
    assert all(isinstance(layer, nn.Linear) for layer in low_rank(twins, 0.25))


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_a_layer_with_hooks_is_refused_and_nothing_is_replaced(kind):
    watched = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    before = list(watched.modules())
    handle = getattr(watched[1], f"register_{kind}")(lambda *_: None)
    with pytest.raises(RequestError, match="'1': has hooks"):
        low_rank(watched, 0.25)
    assert list(watched.modules()) == before
    handle.remove()
    assert isinstance(low_rank(watched, 0.25)[1], nn.Sequential)
