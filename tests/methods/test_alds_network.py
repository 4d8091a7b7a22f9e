"""ALDS of a whole network: within the budget, for every layout, and ready to be trained."""

import pytest
import torch
from torch import nn

from octavo.errors import RequestError
from octavo.forms import GroupedLowRank
from octavo.methods.factorize.alds_network import alds_forms, ranked_layers
from octavo.training import formed, settle


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 24, 3), nn.BatchNorm2d(24), nn.Conv2d(24, 24, 3, groups=24), nn.ConvTranspose2d(24, 12, 3),
        nn.Flatten(), nn.Linear(12 * 16, 20),
    )  # fmt: skip


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_the_forms_fill_the_budget_and_can_be_trained(net, share):
    layers = ranked_layers(net)
    # Not the depthwise convolution.
    assert set(layers) == {"0.weight", "3.weight", "5.weight"}
    found = alds_forms(net, share)
    whole = sum(layer.dense for layer in layers.values())
    assert 0.9 * share * whole < found.allocation.elements <= share * whole
    assert set(found.forms) == {name for name, choice in found.allocation.choices.items() if choice is not None}
    assert all(isinstance(form, GroupedLowRank) for form in found.forms.values())
    for name, form in found.forms.items():
        matrix, choice = layers[name].matrix, found.allocation.choices[name]
        error = float(torch.linalg.matrix_norm(matrix - form.dense(), 2) / torch.linalg.matrix_norm(matrix, 2))
        assert error <= choice.groups**0.5 * found.allocation.error + 1e-5
    formed(net, found.forms, found.layouts)
    assert net(torch.randn(2, 8, 6, 6)).shape == (2, 20)
    settle(net)


def test_groups_are_chosen_for_the_least_error(net):
    assert alds_forms(net, 0.3).allocation.error <= alds_forms(net, 0.3, bound=True).allocation.error
    single = alds_forms(net, 0.3, groups=(1,)).allocation
    assert all(choice.groups == 1 for choice in single.choices.values() if choice is not None)
    assert alds_forms(net, 0.3).allocation.error <= single.error


def test_requests_that_cannot_be_met_are_explained(net):
    for share in (0, 1.0, -1):
        with pytest.raises(RequestError, match="give a number above 0 and below 1"):
            alds_forms(net, share)
    with pytest.raises(RequestError, match="Linear: has no layer to decompose"):
        alds_forms(nn.Linear(4, 4), 0.5)
    with pytest.raises(RequestError, match="coefficients are too few"):
        alds_forms(net, 0.001)
