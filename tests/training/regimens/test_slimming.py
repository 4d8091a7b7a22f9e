"""Slimming: scales are pressed by the stated sub-gradient, and one threshold says which channels stay."""

import pytest
import torch
from torch import nn

from octavo.errors import RequestError
from octavo.methods.prune.thresholds import above
from octavo.training import REGIMENS, cross_entropy, fit
from octavo.training.regimens.slimming import Slimming, scales, without_decay


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 2),
    )  # fmt: skip


def task():
    images = torch.randn(128, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    images[::2] += images[::2].roll(1, -1)
    labels = torch.arange(128) % 2
    return lambda epoch: list(zip(images.split(32), labels.split(32), strict=True))


def test_the_sub_gradient_rises_and_has_the_sign_of_the_scale():
    model, regimen = net(), Slimming(pressure=0.1, rise=0.5)
    regimen.begin(model, 8)
    with torch.no_grad():
        model[1].weight[:3] = torch.tensor([2.0, -2.0, 0.0])
    for step, expected in ((0, 0.025), (1, 0.05), (3, 0.1), (7, 0.1)):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        regimen.after_backward(step)
        assert torch.allclose(model[1].weight.grad[:3], torch.tensor([expected, -expected, 0.0]))
        assert float(model[1].bias.grad.abs().sum() + model[0].weight.grad.abs().sum()) == 0


def test_pressed_scales_are_smaller_and_their_channels_go():
    sizes = {}
    for pressure in (0.0, 0.1):
        model, regimen = net(), Slimming(pressure, share=0.5, floor=0.1)
        fit(model, task(), cross_entropy, epochs=25, optimizer=without_decay(0.1), regimen=regimen)
        sizes[pressure] = torch.cat([scale.detach().abs() for scale in scales(model).values()])
        kept = regimen.hand_over(model).kept
        assert kept.keys() == {"1", "4"} and 14 <= sum(int(mask.sum()) for mask in kept.values()) <= 18
        chosen = torch.cat([kept["1"], kept["4"]])
        assert float(sizes[pressure][chosen].mean()) > float(sizes[pressure][~chosen].mean())
    assert float(sizes[0.1].median()) < 0.2 * float(sizes[0.0].median())


def test_vectors_have_no_weight_decay():
    wide, thin = without_decay(0.1, decay=0.01)(net()).param_groups
    assert wide["weight_decay"] == 0.01 and thin["weight_decay"] == 0
    assert all(p.ndim > 1 for p in wide["params"]) and all(p.ndim == 1 for p in thin["params"])


def test_one_threshold_and_a_floor():
    scores = {"a": torch.tensor([9.0, 8.0, 7.0, 6.0]), "b": torch.tensor([0.1, 0.3, 0.2, 0.4])}
    kept = {name: mask.tolist() for name, mask in above(scores, 0.5, 0.0).items()}
    assert kept == {"a": [True] * 4, "b": [False, False, False, True]}
    assert above(scores, 0.5, 0.5)["b"].tolist() == above(scores, 0.5, 2)["b"].tolist() == [False, True, False, True]
    assert all(bool(mask.any()) for mask in above(scores, 0.99, 0.0).values())


def test_bad_requests_are_told():
    with pytest.raises(RequestError, match="share is 1"):
        above({"a": torch.ones(2)}, 1)
    with pytest.raises(RequestError, match="not finite"):
        above({"a": torch.tensor([1.0, float("nan")])}, 0.5)
    with pytest.raises(RequestError, match="pressure is -1"):
        Slimming(pressure=-1)
    with pytest.raises(RequestError, match="Linear: has no batch normalization with scales"):
        REGIMENS.get("slimming")().begin(nn.Linear(2, 2), 3)
