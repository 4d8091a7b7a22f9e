"""Masks that are held, shrink and move, and the regimens that use them."""

import copy
import itertools

import pytest
import torch
from torch import nn

import octavo
from octavo.errors import RequestError
from octavo.training import DropAndGrow, GradualPruning, Rewinding, accuracy, cross_entropy, fit
from octavo.training.masks import WeightMasks, cubic


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


@pytest.fixture(scope="module")
def examples():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(512, 16, generator=generator)
    labels = (inputs @ torch.randn(16, 4, generator=generator)).argmax(1)
    return list(zip(inputs.split(64), labels.split(64), strict=True))


def trained(examples, regimen, model=None, **options):
    model = model or net()
    fit(model, lambda epoch: examples, cross_entropy, **{"epochs": 10, "lr": 1e-2, "regimen": regimen, **options})
    return model


class Spy:
    """A regimen that says what another does in every step."""

    def __init__(self, inner, look):
        self.inner, self.look, self.seen = inner, look, []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def after_step(self, step):
        self.inner.after_step(step)
        self.seen.append(self.look())


def zeros(model):
    return {name: float((weight == 0).float().mean()) for name, weight in model.named_parameters() if weight.ndim > 1}


def test_the_cubic_rises_fast_and_ends_exactly():
    values = [cubic(k / 10, 0.2, 0.9) for k in range(11)]
    assert values[0] == pytest.approx(0.2) and values[-1] == 0.9
    rises = [b - a for a, b in itertools.pairwise(values)]
    assert all(a > b for a, b in itertools.pairwise(rises))
    assert values[5] == pytest.approx(0.9 - 0.7 * 0.5**3)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, lambda p, lr: torch.optim.SGD(p, lr, 0.9, weight_decay=0.1)])
def test_masked_weights_and_their_optimizer_state_are_zero(examples, optimizer):
    made = []

    def keep(model):
        made.append(optimizer(model.parameters(), lr=1e-2))
        return made[0]

    regimen = GradualPruning(0.7, end=1.0)
    model = trained(examples, regimen, optimizer=keep, epochs=2)
    for weight in (part for part in model.parameters() if part.ndim > 1):
        states = [v for v in made[0].state[weight].values() if isinstance(v, torch.Tensor) and v.shape == weight.shape]
        assert states and all(bool((state[weight == 0] == 0).all()) for state in states)
        assert round(0.7 * weight.numel()) == int((weight == 0).sum())


def test_gradual_pruning_reaches_its_sparsity_exactly_and_learns(examples):
    model = net()
    spy = Spy(GradualPruning(0.8, events=10), lambda: zeros(model)["2.weight"])
    trained(examples, spy, model)
    assert spy.seen[0] == 0 and spy.seen == sorted(spy.seen)
    assert all(share == pytest.approx(0.8, abs=1e-3) for share in zeros(model).values())
    assert spy.seen[round(0.7 * len(spy.seen))] == spy.seen[-1]
    assert accuracy(model, examples) > 0.85


def test_a_schedule_with_more_events_than_steps_still_ends_exactly(examples):
    model = trained(examples[:1], GradualPruning(0.75, events=50), epochs=2)
    assert zeros(model)["2.weight"] == 0.75


def test_one_ranking_spends_weights_where_they_are_large():
    model = net()
    with torch.no_grad():
        model[0].weight.mul_(10)
    masks = WeightMasks(model)
    masks.prune(0.6, across=True)
    found = zeros(model)
    assert found["0.weight"] < 0.1 < 0.6 < found["2.weight"]
    assert masks.density == pytest.approx(0.4, abs=1e-3)


def test_masks_only_shrink():
    model = net()
    masks = WeightMasks(model)
    masks.prune(0.5)
    before = masks.kept["2.weight"].clone()
    with torch.no_grad():
        model[2].weight.add_(torch.randn(64, 64))
    masks.prune(0.75)
    assert not (masks.kept["2.weight"] & ~before).any()
    masks.prune(0.1)
    assert masks.density == pytest.approx(0.25, abs=1e-3)


def test_a_pattern_is_reached_step_by_step(examples):
    regimen = GradualPruning(pattern=(2, 4))
    model = trained(examples, regimen)
    for form in regimen.hand_over(model).forms.values():
        assert form.pattern == (2, 4) and bool((form.mask.view(-1, 4).sum(1) == 2).all())


def test_drop_and_grow_keeps_its_budget_and_moves(examples):
    model, counts = net(), []
    regimen = DropAndGrow(0.3, across=True)
    spy = Spy(regimen, lambda: counts.append(sum(int(kept.sum()) for kept in regimen._masks.kept.values())))
    first = WeightMasks(net())
    first.scatter(0.3, torch.Generator().manual_seed(0))
    trained(examples, spy, model)
    assert len(set(counts)) == 1
    forms = regimen.hand_over(model).forms
    same = sum(int((form.mask & first.kept[name]).sum()) for name, form in forms.items())
    assert same < 0.7 * counts[0]
    # Jointly ranked, tables and rows end with different shares.
    assert len({round(float(form.mask.float().mean()), 2) for form in forms.values()}) > 1


def test_growth_follows_gradients():
    model = net()
    masks = WeightMasks(model, ["2.weight"])
    masks.scatter(0.5, torch.Generator().manual_seed(0))
    kept, size = masks.kept["2.weight"].clone(), model[2].weight.detach().abs().clone()
    wanted = torch.rand(64, 64)
    count = masks.exchange(0.1, {"2.weight": wanted})
    grown, dropped = masks.kept["2.weight"] & ~kept, kept & ~masks.kept["2.weight"]
    assert count == int(grown.sum()) == int(dropped.sum()) == round(0.1 * int(kept.sum()))
    assert wanted[grown].min() >= wanted[~kept & ~grown].max()
    assert size[dropped].max() <= size[kept & ~dropped].min()
    assert bool((model[2].weight[grown] == 0).all())


def test_gradients_of_several_batches_reach_rows_that_one_does_not_see():
    """Each batch looks up one row; the rows of four batches are candidates for growth."""
    torch.manual_seed(0)
    table = nn.Sequential(nn.Embedding(8, 16), nn.Flatten(), nn.Linear(16, 2))
    batches = [(torch.tensor([[row]]), torch.tensor([1])) for row in range(8)]
    grown = {}
    for count in (1, 4):
        model, regimen = copy.deepcopy(table), DropAndGrow(0.25, updates=1, batches=count, names=("0.weight",))
        fit(model, lambda epoch: batches, cross_entropy, lr=1e-3, regimen=regimen)
        first = WeightMasks(copy.deepcopy(table), ["0.weight"])
        first.scatter(0.25, torch.Generator().manual_seed(0))
        grown[count] = (regimen.hand_over(model).forms["0.weight"].mask & ~first.kept["0.weight"]).any(1)
    assert int(grown[4].sum()) > int(grown[1].sum())


def test_rewinding_returns_survivors_to_their_first_values(examples):
    model, start, ticket = net(), net().state_dict(), Rewinding(0.5)
    trained(examples, ticket, model)
    largest = model[2].weight.detach().abs()
    seen = []

    class Look(Spy):
        def begin(self, model, steps):
            self.inner.begin(model, steps)
            seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    largest = largest.clone()
    for _ in range(2):
        trained(examples, Look(ticket, lambda: None), model)
    for name, tensor in seen[0].items():
        kept = tensor != 0
        assert torch.equal(tensor[kept], start[name][kept])
        assert not name.endswith("weight") or float(kept.float().mean()) == 0.5
    survivors = seen[0]["2.weight"] != 0
    assert largest[survivors].min() >= largest[~survivors].max()
    assert ticket.rounds == 3 and zeros(model)["2.weight"] == 0.75
    assert accuracy(model, examples) > 0.85


@pytest.mark.parametrize(
    ("regimen", "rounds"), [(GradualPruning(0.9), 1), (DropAndGrow(0.1), 1), (Rewinding(0.7), 3)], ids=lambda x: type(x)
)
def test_what_is_saved_is_really_small(regimen, rounds, examples, tmp_path):
    def wide():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4))

    model = wide()
    for _ in range(rounds):
        trained(examples, regimen, model, epochs=3)
    report = octavo.save((model, regimen.hand_over(model)), tmp_path / "pruned", report=False)
    # A tenth of the weights in 32 bits, and half a bit for where they are; biases and the manifest.
    assert report.artifact.ratio > 6
    read = octavo.load(tmp_path / "pruned", into=wide())
    assert all(torch.equal(a, b) for a, b in zip(read.state_dict().values(), model.state_dict().values(), strict=True))
    with_budget = octavo.save((model, regimen.hand_over(model)), tmp_path / "coded", ratio=16, preset="data-free")
    assert with_budget.artifact.ratio >= 16


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: GradualPruning(1.0), "sparsity 1.0"),
        (lambda: GradualPruning(0.5, initial=0.6), "initial is 0.6"),
        (lambda: GradualPruning(start=0.8, end=0.2), "start is 0.8"),
        (lambda: GradualPruning(events=0), "events 0"),
        (lambda: GradualPruning(pattern=(4, 4)), "pattern is 4:4"),
        (lambda: DropAndGrow(0.0), "density is 0.0"),
        (lambda: DropAndGrow(first=0.1, last=0.2), "last 0.2"),
        (lambda: DropAndGrow(growth="hope"), "hope"),
        (lambda: Rewinding(0.0), "share is 0.0"),
        (lambda: WeightMasks(net(), ["3.weight"]), "no weight '3.weight'.*0.weight"),
        (lambda: WeightMasks(nn.BatchNorm1d(4)), "no weight to change"),
        (lambda: WeightMasks(nn.Linear(6, 3)).prune(0.5, pattern=(2, 4)), "does not divide its 6 columns"),
        (lambda: GradualPruning().hand_over(net()), "nothing was trained"),
        (lambda: DropAndGrow().hand_over(net()), "nothing was trained"),
        (lambda: Rewinding().hand_over(net()), "nothing was trained"),
    ],
)
def test_what_cannot_be_is_named(make, word):
    with pytest.raises(RequestError, match=word):
        make()
