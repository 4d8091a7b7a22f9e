"""Rank-adaptive tensor trains: their start, their size, cuts that are final, and targets that are met."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.errors import RequestError
from octavo.forms import TensorTrain
from octavo.methods.factorize.mpo import modes
from octavo.recipes.frame import through_file
from octavo.training import accuracy, cross_entropy, fit
from octavo.training.adaptive_trains import attach, fold, random_train, trains
from octavo.training.regimens.comera import CoMERA, core_rates

VOCABULARY, LABELS = 600, 4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.hidden = nn.Embedding(VOCABULARY, 24), nn.Linear(24, 96)
        self.second, self.head = nn.Linear(96, 64), nn.Linear(64, LABELS)

    def forward(self, ids):
        return self.head(torch.relu(self.second(torch.relu(self.hidden(self.words(ids).mean(1))))))


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def task():
    """Words have a topic each, by their number; the label is that of most words."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, LABELS, (768,), generator=generator)
    words = torch.randint(0, VOCABULARY // LABELS, (768, 6), generator=generator) + labels[:, None] * (
        VOCABULARY // LABELS
    )
    noise = torch.rand(words.shape, generator=generator) < 0.3
    words = torch.where(noise, torch.randint(0, VOCABULARY, words.shape, generator=generator), words)
    return lambda epoch: [(words[i : i + 32], labels[i : i + 32]) for i in range(0, 768, 32)]


def regimen(**options):
    return CoMERA(**{"rank": 8, "smallest": 1000, **options})


@pytest.fixture(scope="module")
def early():
    """Size at the start, then the model after the early stage, its forms and its losses."""
    model, stage = net(), regimen(gamma=0.5)
    stage.begin(model, 1)
    start = stage.size
    losses = fit(model, task(), cross_entropy, epochs=8, regimen=stage, optimizer=core_rates(1e-2, 1e-2, 2e-2))
    return start, model, stage.forms(model), losses


def count(form):
    return sum(tensor.numel() for tensor in form.tensors().values())


@pytest.mark.parametrize("deviation", [0.02, 1.0])
def test_the_start_has_the_deviation_asked_for(deviation):
    torch.manual_seed(0)
    layer = random_train((256, 128), (1, 1, 16, 16), (8, 16, 1, 1), 30, deviation)
    table = random_train((4000, 128), modes(4000, 3), modes(128, 3), 30, deviation)
    for form in (layer, table):
        assert float(form.dense().std()) == pytest.approx(deviation, rel=0.25)
    assert layer.ranks == (1, 8, 30, 16, 1)


def test_sizes_count_both_modes_of_a_core():
    model = net()
    stage = regimen()
    stage.begin(model, 1)
    table = trains(model)["words.weight"]
    rows, columns = modes(VOCABULARY, 3), modes(24, 3)[::-1]
    ranks = [1, *(len(d) for d in table.diagonals()), 1]
    expected = sum(ranks[k] * rows[k] * columns[k] * ranks[k + 1] for k in range(3))
    assert table.size() == expected == sum(core.numel() for core in table.cores())
    assert stage.size == sum(train.size() for train in trains(model).values())
    forms = stage.forms(model)
    assert set(forms) == {"words.weight", "hidden.weight", "second.weight"}
    # And so does the file: two bytes an element, and little else.
    assert sum(t.numel() for form in forms.values() for t in form.tensors().values()) == stage.size
    fold(model)
    assert 2 * stage.size < through_file(model, forms).bytes < 2 * stage.size + 6000


def test_a_cut_is_what_the_matrix_is_without_it():
    model = net()
    regimen().begin(model, 1)
    train = trains(model)["hidden.weight"]
    with torch.no_grad():
        for diagonal in train.diagonals():
            diagonal.uniform_(0.5, 2)
        train.diagonals()[1][3] = 0
    before, elements = model.hidden.weight.detach().clone(), train.size()
    ranks, sizes = train.form().ranks, [mode * other for mode, other in zip(*train.modes, strict=True)]
    saved = train.cut(1, 3)
    assert saved == ranks[1] * sizes[1] + sizes[2] * ranks[3] and train.size() == elements - saved
    assert torch.allclose(model.hidden.weight, before)
    form = train.form()
    assert isinstance(form, TensorTrain) and form.ranks[2] == ranks[2] - 1
    assert torch.allclose(form.dense(), before, atol=1e-6)
    # The last rank of a bond stays.
    for place in range(len(train.diagonals()[0])):
        train.cut(0, place)
    assert train.form().ranks[1] == 1


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def layers():
    """A layer and its inputs of every kind, with modes that exceed rows and columns."""
    torch.manual_seed(0)
    ids = torch.tensor([[3, 0, 3], [996, 17, 250]])
    return [
        (nn.Linear(101, 203), torch.randn(2, 3, 101)),
        (nn.Linear(128, 256, bias=False), torch.randn(4, 128)),
        (nn.Embedding(997, 30, padding_idx=0), ids),
        (nn.Embedding(997, 30), ids),
    ]


@pytest.mark.parametrize("which", range(4))
def test_layers_compute_what_the_matrix_does_without_making_it(which):
    layer, x = layers()[which]
    model, stage = nn.Sequential(layer), regimen()
    stage.begin(model, 1)
    (train,) = trains(model).values()
    with torch.no_grad():
        for diagonal in train.diagonals():
            diagonal.uniform_(0.5, 2)
        train.cut(1, 2)

    def dense(x):
        if isinstance(layer, nn.Embedding):
            return functional.embedding(x, layer.weight, layer.padding_idx)
        return functional.linear(x, layer.weight, layer.bias)

    def gradients(call):
        for parameter in model.parameters():
            parameter.grad = None
        out = call(x)
        out.sin().sum().backward()
        return out.detach(), [parameter.grad.clone() for parameter in model.parameters()]

    expected, theirs = gradients(dense)
    with Largest() as largest:
        found, ours = gradients(model)
        stage.loss(model, (x, None), lambda module, batch: module(batch[0]).square().mean()).backward()
    assert torch.allclose(found, expected, atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, theirs, strict=True))
    rows, columns = train.matrix
    assert 0 < largest.elements < rows * columns / 2


def test_tables_that_are_read_as_a_whole_stay_dense():
    model = nn.Sequential(nn.Embedding(600, 24, max_norm=1.0), nn.Linear(24, 96))
    regimen().begin(model, 1)
    assert set(trains(model)) == {"1.weight"}


def test_folding_keeps_the_weights_and_shrinks_the_cores(early):
    start, model, forms, _ = early
    other = copy.deepcopy(model)
    size = sum(train.size() for train in trains(other).values())
    found = fold(other)
    assert not trains(other) and size == sum(map(count, found.values())) <= start
    for name, form in found.items():
        assert torch.allclose(other.get_parameter(name), form.dense(), atol=1e-6)
        assert torch.equal(form.dense(), forms[name].dense())
    # The copy has lost its trains, the model has not.
    assert len(trains(model)) == 3 and torch.allclose(model.words.weight, other.words.weight, atol=1e-5)


def test_ranks_fall_while_it_learns(early):
    start, model, forms, losses = early
    assert sum(map(count, forms.values())) < 0.95 * start
    assert losses[-1] < losses[0] / 2 and accuracy(model, task()(0)) > 0.8


@pytest.mark.parametrize("share", [0.8, 0.5])
def test_the_late_stage_meets_its_target(early, share):
    _, model, forms, _ = early
    late, target = copy.deepcopy(model), round(share * sum(map(count, forms.values())))
    stage = regimen(target=target, loss_target=0.4)
    fit(late, task(), cross_entropy, epochs=6, regimen=stage, optimizer=core_rates(1e-2, 1e-2, 5e-2))
    # Not above, and below by less than what one rank of so small a table takes.
    assert 0.9 * target <= stage.size <= target
    assert accuracy(late, task()(0)) > 0.7
    found = fold(late)
    assert sum(map(count, found.values())) == stage.size
    read = through_file(late, found, dtype=torch.float32).load(net())
    assert accuracy(read, task()(0)) == pytest.approx(accuracy(late, task()(0)), abs=0.01)


def test_a_second_stage_goes_on_from_the_first(early):
    _, model, forms, _ = early
    other, stage = copy.deepcopy(model), regimen()
    stage.begin(other, 1)
    assert all(torch.equal(form.dense(), forms[name].dense()) for name, form in stage.forms(other).items())


def test_without_a_penalty_ranks_stay():
    model, stage = net(), regimen(gamma=0.0)
    losses = fit(model, task(), cross_entropy, epochs=2, regimen=stage, optimizer=core_rates(1e-2, 1e-2, 1e-2))
    fresh = regimen()
    fresh.begin(net(), 1)
    assert stage.size == fresh.size and losses[-1] < losses[0]


@pytest.mark.parametrize("penalty", ["size", "mean"])
def test_penalties_ask_for_what_they_say(penalty):
    """The size-weighted penalty presses hardest where a rank costs most; the mean presses everywhere alike."""
    model, stage = net(), regimen(penalty=penalty, gamma=1.0)
    stage.begin(model, 1)
    stage.loss(model, None, lambda module, batch: torch.zeros((), requires_grad=True)).backward()
    found = trains(model)
    pressure = {name: [float(d.grad.mean()) for d in train.diagonals()] for name, train in found.items()}
    every = [value for values in pressure.values() for value in values]
    if penalty == "mean":
        assert (
            max(every)
            == pytest.approx(min(every))
            == pytest.approx(1 / sum(len(d) for train in found.values() for d in train.diagonals()))
        )
        return
    train = found["words.weight"]
    sizes, ranks = [o * i for o, i in zip(*train.modes, strict=True)], train.form().ranks
    for bond, value in enumerate(pressure["words.weight"]):
        # The derivative of the size: what one entry of this bond costs in both cores.
        cost = ranks[bond] * sizes[bond] + sizes[bond + 1] * ranks[bond + 2]
        assert value == pytest.approx(cost / stage.size, rel=1e-4)


def test_what_was_cut_never_returns(early):
    model = copy.deepcopy(early[1])
    train = trains(model)["words.weight"]
    train.cut(0, 0)
    model(task()(0)[0][0]).sum().backward()
    assert float(train.diagonals()[0].grad[0]) == 0


def test_the_objective_that_is_further_from_its_target_is_pushed():
    model, stage = net(), regimen()
    stage.begin(model, 1)
    whole = stage.size

    def value(target, loss_target, loss):
        stage.target, stage.loss_target = target, loss_target
        return float(stage.loss(model, None, lambda module, batch: torch.tensor(loss)).detach())

    # With all diagonals at 1 the penalty is 1.
    assert value(whole // 2, 0.9, 1.0) == pytest.approx(1 + 0.1 * 1.0 + 0.01 * 1)
    assert value(whole // 2, 0.1, 1.0) == pytest.approx(1.0 + 0.1 * 1.0 + 0.01 * 1)
    # Better than its target, the loss waits; once the size is reached, nothing else counts.
    assert value(whole - 1, 2.0, 1.0) == pytest.approx(1.11)
    assert value(whole, 0.9, 1.0) == 1.0


def test_shapes_that_do_not_factor():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(37, 101), nn.ReLU(), nn.Linear(101, 3))
    regimen().begin(model, 1)
    (train,) = trains(model).values()
    assert model[0].weight.shape == (101, 37) and math.prod(train.modes[0]) >= 101
    assert model(torch.randn(2, 37)).shape == (2, 3)
    assert fold(model)["0.weight"].shape == (101, 37) and not trains(model)


def test_shared_weights_are_left_alone():
    first = nn.Linear(64, 64)
    second = nn.Linear(64, 64)
    model = nn.Sequential(first, nn.ReLU(), second, nn.Linear(64, 64))
    second.weight = first.weight
    regimen().begin(model, 1)
    assert set(trains(model)) == {"3.weight"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"penalty": "l2"}, "'l2' is not known; choose from size, mean"),
        ({"target": 0}, "target is 0"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(RequestError, match=words):
        regimen(**options)


def test_bad_models_and_targets_are_named():
    with pytest.raises(RequestError, match="no linear layer or embedding with 1000 elements"):
        regimen().begin(nn.Linear(4, 4), 1)
    refused = net()
    with pytest.raises(RequestError, match=r"target is 10 elements, but with every rank at 1 there are \d+"):
        regimen(target=10).begin(refused, 1)
    assert not trains(refused)
    assert all(torch.equal(a, b) for a, b in zip(refused.parameters(), net().parameters(), strict=True))


def test_trains_of_other_modes_can_be_attached():
    torch.manual_seed(0)
    model, form = net(), random_train((96, 24), (8, 12), (4, 6), 5, 0.1)
    attach(model, {"hidden.weight": form})
    assert torch.allclose(model.hidden.weight, form.dense()) and trains(model)["hidden.weight"].form().ranks == (
        1,
        5,
        1,
    )


def test_a_padding_row_that_is_zero_stays_zero():
    model = net()
    model.words = nn.Embedding(VOCABULARY, 24, padding_idx=5)
    stage = regimen(gamma=0.5)
    fit(model, task(), cross_entropy, epochs=1, lr=1e-2, regimen=stage)
    rows = model.words(torch.tensor([[5, 6]])).detach()
    assert not rows[0, 0].any() and rows[0, 1].any() and not model.words.weight[5].any()
    forms = fold(model)
    assert not forms["words.weight"].dense()[5].any() and not model.words.weight[5].any()
    assert torch.allclose(model.words(torch.tensor([[5, 6]])), rows, atol=1e-6)
