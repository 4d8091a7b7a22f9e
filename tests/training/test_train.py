"""One training loop: it learns, resumes where it stopped, and trains forms as they will be stored."""

import copy

import pytest
import torch
from torch import nn

import octavo
from octavo.errors import RequestError
from octavo.forms import Dense, Form, LowRank, RowBlocks
from octavo.methods.factorize.dictionaries import Shape, learn, split
from octavo.training import accuracy, cross_entropy, distillation, fit, formed, forms_of, settle
from octavo.training.regimens.dsformer import StraightThroughFactorizer
from octavo.training.regimens.maestro import OrderedDropout


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
