"""Trained rank pruning: what it projects, the pressure it adds, and the forms it hands over."""

import pytest
import torch
from torch import nn

from octavo.errors import RequestError
from octavo.forms import Folded, GroupedLowRank, LowRank
from octavo.recipes.frame import through_file
from octavo.training import cross_entropy, fit
from octavo.training.regimens.trp import FOLDINGS, TrainedRankPruning, decomposed, kernels


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(
            nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=3), nn.ReLU(), nn.Conv2d(12, 12, 1),
            nn.Conv2d(12, 16, (3, 5), padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3),
        )  # fmt: skip

    def forward(self, x):
        return self.body(self.first(x))


def net():
    torch.manual_seed(0)
    return Net()


def batches(epoch):
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(8):
        y = torch.randint(0, 3, (16,), generator=generator)
        yield torch.randn(16, 3, 9, 9, generator=generator) + y[:, None, None, None], y


def ranks(weight, fold):
    """Numerical rank of the folded kernel, of the filter of most with ``filter``."""
    n, c, h, w = weight.shape
    folded = {
        "channel": weight.reshape(1, n, -1),
        "spatial": weight.permute(1, 2, 0, 3).reshape(1, c * h, n * w),
        "filter": weight.reshape(n, c, h * w),
    }[fold]
    return int(torch.linalg.matrix_rank(folded.detach(), rtol=1e-4).max())


def test_only_kernels_that_can_be_decomposed():
    assert list(kernels(net())) == ["body.0.weight", "body.5.weight"]


@pytest.mark.parametrize("fold", FOLDINGS)
def test_what_was_trained_is_what_is_stored(fold):
    model = net()
    regimen = TrainedRankPruning(energy=0.7, every=3, fold=fold)
    before = {name: ranks(weight, fold) for name, weight in kernels(model).items()}
    losses = fit(model, batches, cross_entropy, epochs=4, lr=3e-3, regimen=regimen)
    assert losses[-1] < losses[0]
    forms = regimen.forms(model)
    assert set(forms) == set(kernels(model))
    for name, form in forms.items():
        weight = model.get_parameter(name)
        inner = form.inner if fold != "channel" else form
        assert isinstance(form, Folded) == (fold != "channel")
        assert isinstance(inner, GroupedLowRank if fold == "filter" else LowRank)
        rank = inner.left.shape[1] // (len(weight) if fold == "filter" else 1)
        assert rank == ranks(weight, fold) < before[name]
        assert torch.allclose(form.dense(), weight.flatten(1), atol=1e-5)
    stored = through_file(model, forms, dtype=torch.float32)
    assert stored.bytes < through_file(model, dtype=torch.float32).bytes
    x, _ = next(batches(0))
    expected = model(x)
    assert torch.allclose(stored.load(net())(x), expected, atol=1e-4)


@pytest.mark.parametrize("fold", FOLDINGS)
@pytest.mark.parametrize("energy", [0.4, 0.7])
def test_the_smallest_rank_that_keeps_the_energy(fold, energy):
    weight = net().body[5].weight.detach()
    form = decomposed(weight, fold, energy)
    lost = float((form.dense() - weight.flatten(1)).square().sum() / weight.square().sum())
    assert lost <= 1 - energy + 1e-6
    smaller = decomposed(weight, fold, 1 - lost - 0.02)
    assert sum(part.numel() for part in smaller.tensors().values()) <= sum(p.numel() for p in form.tensors().values())
    # One component less would lose too much: energies just below keep the same rank, those just above need more.
    assert torch.equal(decomposed(weight, fold, 1 - lost - 1e-5).dense(), form.dense())


def test_the_pressure_is_the_gradient_of_the_nuclear_norm():
    """On a step of projection ``nuclear U V^T`` is added to the gradient, and nothing on the others."""
    model = net()
    regimen = TrainedRankPruning(energy=1.0, every=2, nuclear=0.5)
    regimen.begin(model, 3)
    weight = model.body[5].weight
    kept = weight.detach().clone()
    regimen.before_step(0)
    assert torch.equal(weight, kept), "with all energy kept nothing is projected"
    weight.grad = torch.zeros_like(weight)
    regimen.after_backward(0)
    leaf = kept.clone().requires_grad_()
    torch.linalg.matrix_norm(leaf.flatten(1), "nuc").backward()
    assert torch.allclose(weight.grad, 0.5 * leaf.grad, atol=1e-4)
    regimen.before_step(1)
    regimen.after_backward(1)
    assert torch.allclose(weight.grad, 0.5 * leaf.grad, atol=1e-4)


def test_projection_every_few_steps():
    model = net()
    regimen = TrainedRankPruning(energy=0.6, every=2, nuclear=0.0)
    regimen.begin(model, 4)
    weight, full = model.body[5].weight, ranks(model.body[5].weight, "channel")
    regimen.before_step(0)
    assert ranks(weight, "channel") < full
    with torch.no_grad():
        weight.add_(0.05 * torch.randn_like(weight))
    regimen.before_step(1)
    regimen.after_step(1)
    assert ranks(weight, "channel") == full
    regimen.after_step(3)
    assert ranks(weight, "channel") < full, "after the last step there is one more"


def test_kernels_of_zeros_and_of_full_rank():
    assert decomposed(torch.randn(8, 4, 3, 3), "channel", 0.9999) is None
    form = decomposed(torch.zeros(8, 4, 3, 3), "channel", 0.9)
    assert form.left.shape == (8, 1) and not form.dense().any()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"energy": 0.0}, "energy is 0.0"),
        ({"energy": 1.5}, "energy is 1.5"),
        ({"every": 0}, "every is 0"),
        ({"nuclear": -1.0}, "nuclear -1.0"),
        ({"fold": "tucker"}, "'tucker'; choose from channel, spatial, filter"),
    ],
)
def test_unusable_options_are_named(options, word):
    with pytest.raises(RequestError, match=word):
        TrainedRankPruning(**options)


def test_a_net_without_such_kernels_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=8))
    with pytest.raises(RequestError, match="Sequential: has no convolution"):
        TrainedRankPruning().begin(model, 10)
