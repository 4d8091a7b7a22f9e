"""One training loop: it learns, resumes where it stopped, and trains forms as they will be stored."""

import copy

import pytest
import torch
from torch import nn

from octavo.errors import RequestError
from octavo.forms import Dense, LowRank
from octavo.training import accuracy, cross_entropy, distillation, fit, formed, forms_of, settle


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
