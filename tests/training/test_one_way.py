"""One-way filters: what they are, how many weights they have, and the stages that they run in."""

import pytest
import torch
from torch import nn

from octavo.errors import RequestError
from octavo.forms import Separable
from octavo.training import accuracy, cross_entropy, fit, formed, forms_of, in_stages, one_way, settle


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, (5, 3), (2, 1), (2, 1), padding_mode="reflect"), nn.ReLU(),
        nn.Conv2d(6, 8, 3, dilation=2, padding="same", bias=False), nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1, output_padding=1), nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


@pytest.mark.parametrize("terms", [1, 2])
def test_filters_are_sums_of_outer_products_with_the_variance_of_the_layer(terms):
    before, model = net(), one_way(net(), terms)
    found = forms_of(model)
    assert set(found) == {"0.weight", "2.weight", "4.weight"}
    for name, form in found.items():
        layer = before.get_submodule(name[0])
        assert isinstance(form, Separable) and form.terms == terms
        sizes = (layer.in_channels, *layer.kernel_size)
        assert sum(t.numel() for t in form.tensors().values()) == terms * layer.out_channels * sum(sizes)
    large = nn.Conv2d(64, 256, 5)
    deviation = float(large.weight.detach().std())
    (form,) = forms_of(one_way(large, terms)).values()
    assert float(form.dense().std()) == pytest.approx(deviation, rel=0.2)


@pytest.mark.parametrize("terms", [1, 2])
def test_stages_compute_what_the_filters_do(terms):
    model, x = one_way(net(), terms).eval(), torch.randn(2, 3, 12, 11)
    stages = in_stages(model)
    with torch.no_grad():
        # All layers, with strides, paddings and dilations of their own, transposed ones included.
        assert torch.allclose(stages(x), model(x), atol=1e-5)
        assert torch.allclose(stages[0](x), model[0](x), atol=1e-5)
    assert not forms_of(stages) and forms_of(model)
    stages(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in stages.parameters())


def test_they_learn_and_settle():
    torch.manual_seed(0)
    x, y = torch.randn(256, 3, 8, 8), torch.arange(256) % 4
    x += nn.functional.one_hot(y, 8)[:, None, :, None] * 1.5
    model = one_way(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)), 1)
    fit(model, lambda epoch: list(zip(x.split(32), y.split(32), strict=True)), cross_entropy, epochs=6, lr=1e-2)
    whole = model(x)
    assert accuracy(model, [(x, y)]) > 0.8
    assert set(settle(model)) == {"0.weight"} and torch.allclose(model(x), whole, atol=1e-5)


def test_what_cannot_be_made_smaller_is_told():
    with pytest.raises(RequestError, match="0 terms; give at least 1"):
        one_way(net(), 0)
    with pytest.raises(RequestError, match="no filter that 9 terms would make smaller"):
        one_way(nn.Sequential(nn.Conv2d(3, 6, 3), nn.Linear(4, 4)), 9)
    plain = net()
    formed(plain, {})
    with pytest.raises(RequestError, match="has no one-way filters"):
        in_stages(plain)


def test_stages_are_shared_and_frozen_as_their_layers_were():
    torch.manual_seed(0)
    layer, other = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
    model = one_way(nn.Sequential(layer, nn.Sequential(other, layer)))
    layer.requires_grad_(False)
    layer.bias.requires_grad_(True)
    stages, x = in_stages(model), torch.randn(2, 8, 6, 6)
    assert stages[0] is stages[1][1] and stages[1][0] is not stages[0]
    frozen = {name for name, part in stages[0].named_parameters() if not part.requires_grad}
    assert frozen == {"channel.weight", "vertical.weight", "horizontal.weight"}
    assert all(part.requires_grad for part in stages[1][0].parameters())
    assert torch.allclose(stages(x), model(x), atol=1e-5)
