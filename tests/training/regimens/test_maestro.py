"""Ordered dropout: what is drawn, what is penalized, what is learned first, and how layers are cut afterwards."""

import copy

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from octavo.errors import RequestError
from octavo.recipes.frame import through_file
from octavo.recipes.testbeds.linear_maps import angles
from octavo.training import accuracy, cross_entropy, fit
from octavo.training.regimens.maestro import OrderedDropout
from octavo.training.widths import (
    allocated,
    components,
    costs,
    factorizable,
    ladder,
    recalibrate,
    truncated,
    with_weights,
    within_share,
)


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=4),
        nn.ReLU(), nn.Flatten(), nn.Linear(12 * 16, 4),
    )  # fmt: skip


def task():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 2, 6, 6, generator=generator)
    y = (x.flatten(1) @ torch.randn(72, 4, generator=generator)).argmax(1)
    return lambda epoch: list(zip(x.split(32), y.split(32), strict=True))


def test_the_network_begins_as_it_was():
    model, plain = net(), net()
    regimen = OrderedDropout()
    regimen.begin(model, 1)
    assert factorizable(plain) == ("0.weight", "6.weight"), "convolutions in groups are left alone"
    assert regimen.ranks == {"0.weight": 12, "6.weight": 4}
    x = task()(0)[0][0]
    assert torch.allclose(model(x), plain(x), atol=1e-4)
    left, right = (getattr(model[6].parametrizations.weight, f"original{k}") for k in (0, 1))
    # Split evenly: both factors carry the square root of the singular values, in falling order.
    assert torch.allclose(left.norm(dim=0), right.norm(dim=1), atol=1e-4)
    assert bool((left.norm(dim=0).diff() < 1e-6).all())


def test_one_layer_is_narrowed_at_a_time():
    model, regimen = net(), OrderedDropout(growth=2.0)
    regimen.begin(model, 1)
    full = {name: model.get_submodule(name[0]).weight.detach().clone() for name in regimen.ranks}
    seen = set()
    for step in range(200):
        regimen.before_step(step)
        narrowed = []
        for name, weight in full.items():
            matrix = model.get_submodule(name[0]).weight.detach().flatten(1)
            rank = int(torch.linalg.matrix_rank(matrix))
            if not torch.equal(matrix, weight.flatten(1)):
                narrowed.append((name, rank))
        assert len(narrowed) <= 1
        seen.update(narrowed)
        regimen.after_step(step)
    assert seen == {
        ("0.weight", 1),
        ("0.weight", 2),
        ("0.weight", 4),
        ("0.weight", 8),
        ("6.weight", 1),
        ("6.weight", 2),
    }
    assert torch.equal(model[0].weight, full["0.weight"])


def test_the_narrowed_network_learns_from_the_whole_one():
    model, batch = net().eval(), task()(0)[0]
    regimen = OrderedDropout(pressure=0.0, distil=True)
    regimen.begin(model, 1)
    whole, logs = cross_entropy(model, batch), model(batch[0]).log_softmax(-1).detach()
    divergences = []
    for step in range(10):
        regimen.before_step(step)
        narrow = model(batch[0]).log_softmax(-1)
        value = float(regimen.loss(model, batch, cross_entropy).detach())
        divergences.append(float((logs.exp() * (logs - narrow)).sum(-1).mean().detach()))
        assert value == pytest.approx(float(whole.detach()) + divergences[-1], rel=1e-4)
        regimen.after_step(step)
    assert max(divergences) > 1e-3
    losses = fit(net(), task(), cross_entropy, epochs=20, lr=2e-2, regimen=OrderedDropout(pressure=0.0, distil=True))
    assert losses[-1] < losses[0] / 2


def test_ladders():
    assert ladder(1, 2.0) == [1]
    assert ladder(20, 2.0) == [1, 2, 4, 8, 16, 20]
    assert ladder(5, 1.0) == [1, 2, 3, 4, 5]


def test_linear_layers_run_on_their_factors_as_the_matrix_does():
    model, regimen, x = nn.Sequential(nn.Linear(7, 5)), OrderedDropout(), torch.randn(2, 3, 7)
    regimen.begin(model, 1)
    for width in (None, 3):
        regimen._layers["0.weight"].width = width
        assert torch.allclose(model(x), nn.functional.linear(x, model[0].weight, model[0].bias), atol=1e-5)


def test_later_columns_are_penalized_more_and_zero_has_a_slope():
    model, regimen = nn.Sequential(nn.Linear(6, 5, bias=False)), OrderedDropout(pressure=1.0)
    regimen.begin(model, 1)
    left, right = (getattr(model[0].parametrizations.weight, f"original{k}") for k in (0, 1))
    with torch.no_grad():
        left.fill_(1.0)
        right.zero_()
    penalty = regimen.penalty_of(model)
    assert float(penalty.detach()) == pytest.approx(sum((5 * (5 - i)) ** 0.5 for i in range(5)), rel=1e-4)
    penalty.backward()
    slopes = left.grad.norm(dim=0)
    assert bool((slopes.diff() > 0).all()) and bool(torch.isfinite(right.grad).all())


@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_a_linear_map_is_found_in_the_order_of_its_svd(spread):
    plain, weighted = angles(0, spread)
    assert weighted < 5
    assert (plain < 5) == (spread == 0), "unequal inputs give another order than the weights have"


def test_columns_without_use_are_dropped():
    generator = torch.Generator().manual_seed(0)
    planted = torch.randn(10, 3, generator=generator) @ torch.randn(3, 12, generator=generator) / 3
    x = torch.randn(512, 12, generator=generator)
    pairs = list(zip(x.split(64), (x @ planted.t()).split(64), strict=True))
    model = nn.Sequential(nn.Linear(12, 10, bias=False))
    regimen = OrderedDropout(pressure=1e-2, threshold=1e-2)
    fit(
        model, lambda epoch: pairs, lambda module, batch: (module(batch[0]) - batch[1]).square().sum(1).mean(),
        epochs=60, optimizer=lambda module: torch.optim.SGD(module.parameters(), 0.02, 0.9), regimen=regimen,
    )  # fmt: skip
    assert regimen.ranks == {"0.weight": 3}
    form = regimen.forms(model)["0.weight"]
    assert form.left.shape == (10, 3) and regimen.ranks == {"0.weight": 3}
    assert float((form.dense() - planted).norm() / planted.norm()) < 0.05


def test_ranks_fall_at_the_defaults_while_a_network_learns():
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images[:1280]).float() / 8 - 1, torch.tensor(labels[:1280])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    regimen, batches = OrderedDropout(names=("0.weight", "2.weight")), list(zip(x.split(64), y.split(64), strict=True))
    fit(model, lambda epoch: batches, cross_entropy, epochs=12, lr=1e-2, regimen=regimen)
    assert accuracy(model, batches) > 0.95 and max(regimen.ranks.values()) < 40


def test_a_trained_network_is_cut_stored_and_read_back():
    model, batches = net(), task()
    regimen = OrderedDropout(pressure=0.0)
    losses = fit(model, batches, cross_entropy, epochs=20, lr=2e-2, regimen=regimen)
    forms = regimen.forms(model)
    assert losses[-1] < losses[0] / 2 and isinstance(model[0].weight, nn.Parameter)
    assert torch.allclose(model[0].weight.flatten(1), forms["0.weight"].dense(), atol=1e-5)
    cut = truncated(forms, {"0.weight": 6, "6.weight": 2})
    assert torch.equal(cut["0.weight"].left.dense(), forms["0.weight"].left.dense()[:, :6])
    stored = through_file(model, cut)
    assert accuracy(stored.load(net()), batches(0)) > 0.5
    assert stored.bytes < through_file(model).bytes


def test_forms_leave_copies_as_they_are():
    model, regimen, x = net().eval(), OrderedDropout(), task()(0)[0][0]
    regimen.begin(model, 1)
    other = copy.deepcopy(model)
    regimen.forms(model)
    assert torch.allclose(other(x), model(x), atol=1e-6)
    assert isinstance(model[0].weight, nn.Parameter) and not isinstance(other[0].weight, nn.Parameter)


def test_normalization_is_recalibrated_without_touching_anything_else():
    model, x = net(), task()(0)[0][0]
    model.train()(x)
    before = copy.deepcopy(model.state_dict())
    recalibrate(model.eval(), [x[:16], x[16:]])
    inputs = model[0](x)
    assert torch.allclose(model[1].running_mean, inputs.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(model[1].running_var, inputs.var((0, 2, 3)), rtol=0.05)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert not model.training and model[1].momentum == 0.1


@pytest.mark.parametrize("where", ["none", "shape", "reading"])
def test_statistics_stay_where_they_cannot_be_recalibrated(where):
    def batches():
        if where != "none":
            yield x[:16]
            yield x[:, :, 1:, :, None] if where == "shape" else [][0]

    model, x = net(), task()(0)[0][0]
    model.train()(x)
    before = copy.deepcopy(model.state_dict())
    error, said = (IndexError, "list") if where == "reading" else (RequestError, "no batches|fails on a batch")
    with pytest.raises(error, match=said):
        recalibrate(model, batches())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model[1].momentum == 0.1 and model.training


def test_a_normalization_that_does_not_run_keeps_its_statistics():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.other = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.used(x)

    model, x = Half(), torch.randn(32, 4) + 3
    model.other(x)
    before = copy.deepcopy(model.other.state_dict())
    recalibrate(model, [x])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.other.state_dict().items())
    assert torch.allclose(model.used.running_mean, x.mean(0), atol=1e-5)


def test_widths_go_where_they_lower_the_loss_most():
    shapes = {"a": (10, 10), "b": (10, 10)}
    curves = {"a": {1: 3.0, 2: 1.0, 3: 0.9}, "b": {1: 1.0, 2: 0.9, 3: 0.2}}
    assert allocated(curves, shapes, 40) == {"a": 1, "b": 1}
    assert allocated(curves, shapes, 60) == {"a": 2, "b": 1}
    # Not convex at b: its second column alone is worth little, both together are.
    assert allocated(curves, shapes, 100) == {"a": 2, "b": 3}
    assert allocated(curves, shapes, 120) == {"a": 3, "b": 3}
    with pytest.raises(RequestError, match="39 weights are too few, as a width of 1 in all layers takes 40"):
        allocated(curves, shapes, 39)


def test_a_width_that_is_no_smaller_costs_what_the_matrix_does():
    curves = {"a": {1: 2.0, 4: 1.0, 8: 0.0}}
    assert allocated(curves, {"a": (8, 8)}, 63) == {"a": 3}
    assert allocated(curves, {"a": (8, 8)}, 64) == {"a": 8}


def test_ranks_of_a_share_are_chosen_by_what_each_costs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10, bias=False), nn.Linear(10, 10, bias=False))
    # Only one direction of the first layer matters, and all of the second.
    model[0].weight.data = torch.outer(torch.randn(10), torch.randn(12)) + 0.01 * torch.randn(10, 12)
    model[1].weight.data = torch.linalg.qr(torch.randn(10, 10))[0]
    forms, x = components(model), torch.randn(64, 12) @ torch.randn(12, 12)
    whole = model(x).detach()
    with torch.no_grad():
        assert torch.allclose(with_weights(model, forms)(x), whole, atol=1e-4)
        curves = costs(model, forms, lambda net: float((net(x) - whole).square().mean()))
    assert curves["0.weight"][1] < curves["1.weight"][1] and curves["0.weight"][10] == pytest.approx(0, abs=1e-6)
    cut = within_share(forms, curves, 0.5)
    assert cut["0.weight"].left.shape[1] < cut["1.weight"].left.shape[1]
    assert sum(part.numel() for form in cut.values() for part in form.tensors().values()) <= 110
    # What would not be smaller as factors stays dense.
    assert "1.weight" not in within_share(forms, curves, 1.0)


def test_bad_requests_are_told():
    with pytest.raises(RequestError, match=r"growth 0\.5"):
        OrderedDropout(growth=0.5)
    with pytest.raises(RequestError, match=r"no matrix '1\.weight'"):
        OrderedDropout(names=("1.weight",)).begin(net(), 1)
    with pytest.raises(RequestError, match="no linear layer"):
        OrderedDropout().begin(nn.Sequential(nn.ReLU(), nn.LayerNorm(3)), 1)
    model, regimen = nn.Sequential(nn.Linear(6, 5)), OrderedDropout()
    regimen.begin(model, 1)
    forms = regimen.forms(model)
    for width in (0, 6):
        with pytest.raises(RequestError, match=f"5 columns and cannot be cut to {width}"):
            truncated(forms, {"0.weight": width})
