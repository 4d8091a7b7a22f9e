"""Turbo-VBI: noise of weights at the outputs, their divergence, and what is left of a task with few inputs."""

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from octavo.errors import RequestError
from octavo.forms import Sparse
from octavo.training import cross_entropy, fit
from octavo.training.clustered_support import SupportPrior
from octavo.training.regimens.turbo_vbi import TurboVBI


def begun(model, **knobs):
    regimen = TurboVBI(1000, **knobs)
    regimen.begin(model, 40)
    return regimen


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(6, 4), (1, 6)), (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (1, 4, 5, 5))],
)
def test_outputs_vary_as_those_of_drawn_weights(layer, shape):
    torch.manual_seed(0)
    layer, x = nn.Sequential(layer).train(), torch.randn(shape)
    expected = layer(x)
    begun(layer, names=("0.weight",))
    with torch.no_grad():
        noisy = layer(x.expand(20_000, *shape[1:]))
        # Half of the root mean square of the weights: exp(-6) of its square is their variance.
        deviation = (layer[0].weight.square().mean() * torch.exp(torch.tensor(-6.0))).sqrt()
        plain = nn.Sequential(*[layer[0]])
        plain.eval()
        assert torch.equal(plain(x), expected), "in evaluation there is no noise"
        drawn = torch.stack(
            [
                torch.func.functional_call(
                    plain, {"0.weight": layer[0].weight + deviation * torch.randn_like(layer[0].weight)}, (x,)
                )[0]
                for _ in range(4_000)
            ]
        )
    assert torch.allclose(noisy.mean(0), expected[0], atol=0.02)
    assert torch.allclose(noisy.std(0), drawn.std(0), rtol=0.1)


def test_the_penalty_is_the_divergence_per_example():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3))
    regimen = begun(model, warmup=0.5)
    weight = model[0].weight.detach()
    state = regimen.state()["weights"]["0.weight"]
    q = Normal(weight / state["unit"] ** 0.5, (state["log_variance"] / 2).exp())
    expected = kl_divergence(q, Normal(0.0, state["precision"].rsqrt())).sum() / 1000
    for step, share in ((0, 1 / 20), (9, 1 / 2), (19, 1), (25, 1)):
        regimen.before_step(step)
        assert torch.allclose(regimen.penalty_of(model), share * expected, rtol=1e-4)


def task(epoch):
    """Only inputs 8 to 15 of 40 matter."""
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(30):
        x = torch.randn(64, 40, generator=generator)
        yield x, (x[:, 8:12].sum(1) > 0).long() + 2 * (x[:, 12:16].sum(1) > 0).long()


def trained(**knobs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 16), nn.ReLU(), nn.Linear(16, 4))
    regimen = TurboVBI(500, names=("0.weight",), **knobs)
    fit(model, task, cross_entropy, epochs=8, lr=1e-2, regimen=regimen)
    return model, regimen


def test_only_inputs_that_matter_are_left():
    model, regimen = trained(prior=SupportPrior(0.2, 4.0))
    form = regimen.hand_over(model).forms["0.weight"]
    assert isinstance(form, Sparse) and torch.equal(form.dense(), model[0].weight.detach())
    mask = form.mask
    assert float(mask[:, 8:16].float().mean()) > 5 * float(mask[:, 16:].float().mean())
    assert 0.02 < float(mask.float().mean()) < 0.3
    x, y = next(iter(task(99)))
    assert float((model(x).argmax(1) == y).float().mean()) > 0.9
    assert torch.equal(model.train()(x), model(x)), "the noise is gone"
    assert regimen.supports()["0.weight"].shape == (16, 40)


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"examples": 0}, "examples is 0"),
        ({"examples": 10, "every": 0}, "every 0"),
        ({"examples": 10, "warmup": 0.5, "tuned": 0.5}, "together must be below 1"),
    ],
)
def test_unusable_knobs_are_named(knobs, says):
    with pytest.raises(RequestError, match=says):
        TurboVBI(**knobs)


def test_weights_that_cannot_take_part_are_named():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), torch.randn(2, 3)
    with pytest.raises(RequestError, match=r"Sequential: '1\.weight' is not the weight of a linear layer"):
        begun(model, names=("0.weight", "1.weight"))
    assert torch.equal(model(x), model(x)), "no layer has noise"
    with pytest.raises(RequestError, match="has no linear layer"):
        begun(nn.Sequential(nn.LayerNorm(3)))
