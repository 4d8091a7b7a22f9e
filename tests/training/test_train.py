"""One training loop: it learns, resumes where it stopped, and trains forms as they will be stored."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks

import octavo
from octavo.errors import DivergedError, RequestError
from octavo.forms import Dense, Form, LowRank, RowBlocks
from octavo.methods.factorize.dictionaries import Shape, learn, split
from octavo.training import (
    REGIMENS,
    DropAndGrow,
    GradualPruning,
    accuracy,
    cross_entropy,
    distillation,
    fit,
    formed,
    forms_of,
    settle,
)
from octavo.training.masks import WeightMasks
from octavo.training.regimens.dsformer import StraightThroughFactorizer
from octavo.training.regimens.fliqs import FormatSearch
from octavo.training.regimens.learned_levels import LearnedLevels
from octavo.training.regimens.maestro import OrderedDropout
from octavo.training.regimens.quantized_training import QuantizedTraining


def task():
    torch.manual_seed(0)
    x = torch.randn(512, 16)
    y = (x @ torch.randn(16, 4)).argmax(1)
    return lambda epoch: [(x[i : i + 64], y[i : i + 64]) for i in range(0, 512, 64)]


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def low_rank(rows, columns, rank):
    return LowRank(Dense(torch.randn(rows, rank) / rank**0.5), Dense(torch.randn(rank, columns) / columns**0.5))


def test_forms_are_trained_and_handed_over():
    model, batches = net(), task()
    formed(model, {"0.weight": low_rank(32, 16, 5)})
    losses = fit(model, batches, cross_entropy, epochs=20, lr=1e-2)
    assert losses[-1] < losses[0] / 2 and accuracy(model, batches(0)) > 0.8
    form = forms_of(model)["0.weight"]
    assert isinstance(form, LowRank) and form.left.shape == (32, 5)
    before = model(batches(0)[0][0])
    assert settle(model).keys() == {"0.weight"} and isinstance(model[0].weight, nn.Parameter)
    assert torch.equal(model(batches(0)[0][0]), before) and torch.equal(model[0].weight, form.dense())


def test_settling_a_copy_leaves_the_model_in_its_forms():
    model, x = net(), task()(0)[0][0]
    formed(model, {"0.weight": low_rank(32, 16, 5)})
    before, other = model(x), copy.deepcopy(model)
    settle(other)
    assert torch.equal(model(x), before) and torch.equal(other(x), before)
    assert forms_of(model).keys() == {"0.weight"} and not forms_of(other)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    file = tmp_path / "state"
    fit(net(), task(), cross_entropy, epochs=2, checkpoint=file)
    for other in ({"epochs": 3}, {"epochs": 2, "seed": 1}, {"epochs": 2, "lr": 0.1}):
        with pytest.raises(RequestError, match="a checkpoint of another run"):
            fit(net(), task(), cross_entropy, checkpoint=file, **other)


def test_epochs_of_another_length_are_told():
    with pytest.raises(RequestError, match="epoch 1 has 7 batches, but epoch 0 has 8"):
        fit(net(), lambda epoch: task()(epoch)[epoch:], cross_entropy, epochs=2)


def test_a_student_follows_its_teacher():
    teacher, student, batches = net(), net(seed=1), task()
    fit(teacher, batches, cross_entropy, epochs=20, lr=1e-2)
    fit(student, batches, distillation(teacher), epochs=20, lr=1e-2)
    x = batches(0)[0][0]
    assert float((student(x).argmax(1) == teacher(x).argmax(1)).float().mean()) > 0.8


def test_bad_requests_are_told(tmp_path):
    model, batches = net(), task()
    with pytest.raises(RequestError, match=r"no parameter '7\.weight'"):
        formed(model, {"7.weight": low_rank(32, 16, 2)})
    with pytest.raises(RequestError, match=r"\(32, 16\) does not match a form of shape \(16, 32\)"):
        formed(model, {"0.weight": low_rank(16, 32, 2)})
    model[2].weight = model[0].weight
    with pytest.raises(RequestError, match="shared"):
        formed(model, {"0.weight": low_rank(32, 16, 2)})
    with pytest.raises(RequestError, match="an epoch has none"):
        fit(net(), lambda epoch: [], cross_entropy)
    with pytest.raises(RequestError, match="the loss is nan in step 0"):
        fit(net(), batches, lambda module, batch: cross_entropy(module, batch) * float("nan"))
    (tmp_path / "state").write_bytes(b"not a checkpoint")
    with pytest.raises(RequestError, match="not a checkpoint"):
        fit(net(), batches, cross_entropy, checkpoint=tmp_path / "state")


def test_dropout_draws_other_masks_in_every_step():
    torch.manual_seed(0)
    model, drawn = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 2)), []
    model[0].register_forward_hook(lambda module, inputs, output: drawn.append((output == 0).clone()))
    batch = torch.ones(8, 64), torch.zeros(8, dtype=torch.long)
    fit(model, lambda epoch: [batch] * 3, cross_entropy)
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])


def tied():
    """An embedding whose weight is that of the layer behind it."""
    model = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 12, bias=False))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize("name", ["0.weight", "1.weight"])
@pytest.mark.parametrize(
    "regimen",
    [
        lambda name: OrderedDropout(names=(name,)),
        lambda name: StraightThroughFactorizer({name: Shape(4, 4, 2)}),
    ],
)
def test_tied_weights_are_refused_by_either_name(regimen, name):
    model = tied()
    with pytest.raises(RequestError, match=f"'{name}': is shared with another module"):
        regimen(name).begin(model, 1)
    assert model[1].weight is model[0].weight


def test_forms_follow_a_model_to_another_device():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 6))
    shape = Shape(4, 6, 2)
    sparse = learn(split(model[0].weight.detach(), 4), shape, 1).form(8)
    blocks = RowBlocks(torch.arange(6) % 2, (Dense(torch.ones(3, 6)), Dense(torch.ones(3, 6))))
    formed(model, {"0.weight": sparse, "1.weight": blocks})
    assert model(torch.ones(2, 8)).shape == (2, 6)
    assert model.to("meta")(torch.ones(2, 8, device="meta")).shape == (2, 6)
    devices = {tensor.device.type for form in forms_of(model).values() for tensor in form.held()}
    assert devices == {"meta"}


def test_start_values_are_not_kept_and_a_computed_weight_cannot_be_set():
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    formed(model, {"0.weight": low_rank(64, 64, 2)})
    held = [
        part
        for module in model.modules()
        for value in vars(module).values()
        for part in (value.held() if isinstance(value, Form) else value if isinstance(value, list) else [])
    ]
    assert not [part for part in held if isinstance(part, torch.Tensor) and not part.is_meta]
    with pytest.raises(RequestError, match="is computed from a lowrank form, so it cannot be set; call"):
        model[0].weight = torch.ones(64, 64)


@pytest.mark.parametrize("first", [0.0, 0.5])
def test_a_padding_row_that_is_zero_stays_zero(first, tmp_path):
    def padded():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(12, 8, padding_idx=3), nn.Flatten(), nn.Linear(24, 4))
        model[0].weight.data[3] = first
        return model

    model, index = padded(), torch.randint(0, 12, (64, 3))
    formed(model, {"0.weight": low_rank(12, 8, 3)})
    fit(model, lambda epoch: [(index, index[:, 0] % 4)] * 10, cross_entropy, epochs=3, lr=1e-2)
    forms = settle(model)
    assert bool((model[0].weight[3] == 0).all()) is (first == 0)
    assert torch.equal(model[0].weight, forms["0.weight"].dense()) and int((model[0].weight == 0).all(1).sum()) < 2
    octavo.save((model, forms), tmp_path / "small", report=False, progress=False)
    stored = octavo.load(tmp_path / "small", into=padded())
    assert bool((stored[0].weight[3] == 0).all()) is (first == 0)


def momentum(model):
    return torch.optim.SGD(model.parameters(), 0.1, 0.9)


def test_gradients_from_before_do_not_count():
    fresh, used = net(), net()
    for weight in used.parameters():
        weight.grad = torch.full_like(weight, 100.0)
    # Frozen, it is in no step, but would be in the norm by which gradients are clipped.
    used[0].bias.requires_grad_(False)
    fresh[0].bias.requires_grad_(False)
    for model in (fresh, used):
        fit(model, lambda epoch: task()(epoch)[:1], cross_entropy, optimizer=momentum)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), used.parameters(), strict=True))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"regimen": GradualPruning(0.9)}, "knob 'sparsity': 0.5 there, 0.9 here"),
        ({"regimen": DropAndGrow(0.5)}, "regimen: GradualPruning there, DropAndGrow here"),
        ({"regimen": None}, "regimen: GradualPruning there, Regimen here"),
        ({"optimizer": lambda model: torch.optim.Adam(model.parameters(), 0.1)}, "optimizer: SGD there, Adam here"),
    ],
)
def test_a_checkpoint_of_another_regimen_or_optimizer_is_refused(other, said, tmp_path):
    options = {"epochs": 1, "checkpoint": tmp_path / "state", "optimizer": momentum, "regimen": GradualPruning(0.5)}
    fit(net(), task(), cross_entropy, **options)
    with pytest.raises(RequestError, match=f"a checkpoint of another run .{said}"):
        fit(net(), task(), cross_entropy, **{**options, **other})
    again = {**options, "regimen": GradualPruning(0.5)}
    assert len(fit(net(), task(), cross_entropy, **again)) == 1


def test_a_checkpoint_of_another_net_changes_nothing(tmp_path):
    options = {"checkpoint": tmp_path / "state", "optimizer": momentum}
    fit(net(), task(), cross_entropy, **options)
    # The first layer has the shape of the one in the checkpoint.
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RequestError, match="its weights have other names or shapes"):
        fit(model, task(), cross_entropy, **options)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "begin",
    [
        lambda model: QuantizedTraining().begin(model, 1),
        lambda model: LearnedLevels(4).begin(model, 1),
        lambda model: FormatSearch().begin(model, 1),
        lambda model: OrderedDropout(names=("body.weight", "head.weight")).begin(model, 1),
        lambda model: StraightThroughFactorizer(dict.fromkeys(("body.weight", "head.weight"), Shape(4, 4, 2))).begin(
            model, 1
        ),
        lambda model: formed(model, {"body.weight": low_rank(8, 8, 2), "head.weight": low_rank(12, 8, 2)}),
    ],
    ids=["quantized", "levels", "formats", "dropout", "factorizer", "formed"],
)
def test_what_is_refused_for_one_weight_changes_no_other(begin):
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "table": nn.Embedding(12, 8), "head": nn.Linear(8, 12, bias=False)})
    model["head"].weight = model["table"].weight
    before = {name: (weight, weight.detach().clone()) for name, weight in model.named_parameters()}
    with pytest.raises(RequestError, match="is shared with another module"):
        begin(model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is weight and torch.equal(weight, value) for name, (weight, value) in before.items())


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Flatten(),
        nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 4),
    )  # fmt: skip


@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("name", REGIMENS.names())
def test_a_run_that_fails_leaves_no_hooks_and_no_frozen_weights(name, step):
    def failing(module, batch):
        value = cross_entropy(module, batch)
        return next(values) * value

    model, values = convolutions(), iter([1.0] * step + [float("nan")])
    batch = torch.randn(4, 2, 4, 4), torch.arange(4)
    regimen = REGIMENS.get(name).suited_to(model)
    if name == "vtrans":
        regimen.only_masks = True
    with pytest.raises(DivergedError, match=f"in step {step} of 8"):
        fit(model, lambda epoch: [batch] * 8, failing, regimen=regimen)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert not _global_optimizer_post_hooks and all(weight.requires_grad for weight in model.parameters())
    assert torch.equal(model(batch[0]), model(batch[0]))


def test_a_run_that_fails_restores_columns_that_were_not_drawn():
    model = net()
    with pytest.raises(DivergedError):
        fit(
            model,
            lambda epoch: [(torch.full((2, 16), torch.nan), torch.arange(2))],
            cross_entropy,
            regimen=OrderedDropout(),
        )
    assert [int(torch.linalg.matrix_rank(model[k].weight)) for k in (0, 2)] == [16, 4]


def test_other_masks_of_the_same_weights_do_not_disturb_a_run():
    model = net()
    others = [WeightMasks(model), WeightMasks(model)]
    fit(model, task(), cross_entropy, regimen=GradualPruning(0.5))
    assert float((model[0].weight == 0).float().mean()) == 0.5 and all(part.density == 1 for part in others)


def test_work_before_the_first_step_is_linear_in_layers():
    def calls(layers):
        model, seen = nn.Sequential(*[nn.Linear(2, 2) for _ in range(layers)]), []
        sys.setprofile(lambda frame, event, arg: seen.append(event))
        try:
            QuantizedTraining().begin(model, 1)
        finally:
            sys.setprofile(None)
        return len(seen)

    few, many, more = (calls(layers) for layers in (40, 80, 160))
    assert more - many < 2.2 * (many - few)
