"""The contract of every regimen: it passes by being registered, on a small net that has layers of every kind."""

import copy

import pytest
import torch
from torch import nn

from octavo.artifact import pack, unpack
from octavo.recipes.frame import through_file
from octavo.sources.sites import Layout
from octavo.training import REGIMENS, HandOver, Regimen, accuracy, cross_entropy, fit

NAMES = ["none", *REGIMENS.names()]


def made(name, model):
    return (Regimen if name == "none" else REGIMENS.get(name)).suited_to(model)


def net(seed=0):
    """Two convolutions, one of them normalized, and a linear layer that is large enough for regimens that leave small ones alone."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(), nn.Linear(72, 64), nn.ReLU(), nn.Linear(64, 4),
    )  # fmt: skip


def task():
    """The brightest quarter of an image."""
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(192, 2, 6, 6, generator=generator)
    labels = images[:, 0].unflatten(1, (2, 3)).unflatten(3, (2, 3)).mean((2, 4)).flatten(1).argmax(1)
    return lambda epoch: [(images[i : i + 32], labels[i : i + 32]) for i in range(0, 192, 32)]


HOW = {"loss": cross_entropy, "epochs": 4, "lr": 1e-2}


@pytest.fixture(scope="module", params=NAMES)
def trained(request):
    model = net()
    regimen = made(request.param, model)
    losses = fit(model, task(), regimen=regimen, **HOW)
    left = regimen.hand_over(model)
    return request.param, model, regimen, losses, left


def test_it_learns_and_hands_over_forms_of_weights(trained):
    name, model, _, losses, left = trained
    assert isinstance(left, HandOver) and losses[-1] < losses[0]
    shapes = {key: tuple(tensor.shape) for key, tensor in net().state_dict().items()}
    assert left.forms.keys() <= shapes.keys() and (left.forms or left.kept or name == "none")
    for key, form in left.forms.items():
        assert form.shape == Layout().matrix_shape(shapes[key])
    assert accuracy(model, task()(0)) > 0.3


def test_what_is_handed_over_is_the_net_that_was_trained(trained):
    _, model, _, _, left = trained
    stored, images = through_file(dense(model, left), left.forms, dtype=torch.float32), task()(0)[0][0]
    with torch.no_grad():
        expected, found = model.eval()(images), stored.load(net())(images)
    assert torch.allclose(found, expected, atol=1e-3 * float(expected.abs().max()))


def dense(model, left):
    """The net as one of plain layers, whatever computes its weights."""
    plain = net()
    own = dict(model.state_dict())
    plain.load_state_dict({key: own.get(key, tensor) for key, tensor in plain.state_dict().items()})
    with torch.no_grad():
        for key, form in left.forms.items():
            plain.get_parameter(key).copy_(Layout().from_matrix(form.dense(), tuple(plain.get_parameter(key).shape)))
    return plain


def test_forms_are_restored_bit_for_bit_and_given_again(trained):
    _, model, regimen, _, left = trained
    for key, form in left.forms.items():
        packed = pack(form)
        again = unpack(memoryview(packed.blob), packed.parts, packed.meta, form.shape)
        assert torch.equal(again.dense(), form.dense())
        assert torch.equal(regimen.hand_over(model).forms[key].dense(), form.dense())


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(name, tmp_path):
    class Stop(Exception):
        pass

    batches = task()

    def interrupted(number):
        if number == 2:
            raise Stop
        return batches(number)

    whole, halved, again = net(), net(), net(seed=5)
    ours, theirs = made(name, whole), made(name, again)
    expected = fit(whole, batches, regimen=ours, **HOW)
    with pytest.raises(Stop):
        fit(halved, interrupted, regimen=made(name, halved), checkpoint=tmp_path / "state", **HOW)
    found = fit(again, batches, regimen=theirs, checkpoint=tmp_path / "state", **HOW)
    assert found == expected
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    forms = [regimen.hand_over(model).forms for regimen, model in ((ours, whole), (theirs, again))]
    assert all(torch.equal(form.dense(), forms[1][key].dense()) for key, form in forms[0].items())


@pytest.mark.parametrize("name", NAMES)
def test_the_penalty_is_a_scalar_with_a_gradient(name):
    model = net()
    regimen = made(name, model)
    regimen.begin(model, 6)
    regimen.before_step(0)
    penalty, batch = regimen.penalty_of(model), task()(0)[0]
    value = regimen.loss(model, batch, cross_entropy)
    assert value.ndim == 0 and value.requires_grad
    if penalty is not None:
        assert penalty.ndim == 0 and penalty.requires_grad and bool(torch.isfinite(penalty))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_net(name):
    nets = [net(), net()]
    for model in nets:
        fit(model, task(), regimen=made(name, copy.deepcopy(model)), loss=cross_entropy, epochs=1, lr=1e-2, seed=4)
    pairs = zip(nets[0].state_dict().values(), nets[1].state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
