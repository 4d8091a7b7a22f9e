"""Clip ratios of weights and inputs, searched layer by layer and together."""

import copy
import math

import pytest
import torch
from torch import nn

from octavo.errors import RequestError
from octavo.methods.quantize.clip_search import ClipSearch


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, states):
        return states + self.outer(self.inner(states).relu())


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return nn.Sequential(*(Residual(64) for _ in range(3)))


@pytest.fixture(scope="module")
def batches():
    draws = torch.Generator().manual_seed(1)
    return [torch.randn(4, 20, 64, generator=draws) ** 3 for _ in range(2)]


def rounded(net, found):
    """The net with what was found, as a user applies it."""
    copied = copy.deepcopy(net)
    copied.load_state_dict({**net.state_dict(), **{name: form.dense() for name, form in found.forms.items()}})
    return copied


def test_joint_search_is_never_worse_at_the_output_of_its_block(net, batches):
    search = ClipSearch(ratios=(1.0, 0.7))
    alone, joint = search.search(net, [("0",), ("1",), ("2",)], batches), search.search(net, [("0", "1", "2")], batches)
    assert joint.errors[0] <= alone.errors[-1]
    assert (alone.runs, joint.runs) == (3 * 4, 4 + 4**2 + 4**3)


def test_what_was_found_is_what_was_measured(net, batches):
    before = copy.deepcopy(net.state_dict())
    found = ClipSearch(ratios=(1.0, 0.8, 0.6)).search(net, [("0", "1"), ("2",)], batches)
    model = rounded(net, found)
    with torch.no_grad(), found.rounding_inputs(model):
        errors = [(net(batch) - model(batch)).abs().sqrt().mean() for batch in batches]
    assert math.isclose(float(torch.stack(errors).mean()), found.errors[-1], rel_tol=1e-5)
    with torch.no_grad():
        # Beyond the context inputs are as they were.
        assert not torch.equal(model(batches[0]), net(batches[0]))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert set(found.forms) == {name for name in before if name.endswith("weight")}


def test_range_that_no_input_uses_is_clipped(batches):
    net, batches = nn.Sequential(nn.Linear(64, 32)), [batch.clone() for batch in batches]
    with torch.no_grad():
        net[0].weight[:, :2] = torch.tensor([0.5, -0.5])
        for batch in batches:
            batch[..., :2] = 0
    plain = ClipSearch(ratios=(1.0,)).search(net, [("0",)], batches)
    searched = ClipSearch(ratios=(1.0, 0.6, 0.3)).search(net, [("0",)], batches)
    finer = ClipSearch(8, 8, ratios=(1.0,)).search(net, [("0",)], batches)
    assert finer.errors[0] < searched.errors[0] < plain.errors[0]
    assert searched.clips["0"].weights < 1


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ([("0", "2")], "does not read"),
        ([("0",), ("0",)], "each layer once"),
        ([()], "each layer once"),
        ([("7",)], "has no layer '7'"),
    ],
)
def test_bad_blocks_are_named(net, batches, blocks, said):
    with pytest.raises(RequestError, match=said):
        ClipSearch(ratios=(1.0,)).search(net, blocks, batches)


def test_bad_input_is_named(net, batches):
    with pytest.raises(RequestError, match="ratios"):
        ClipSearch(ratios=(1.2,))
    with pytest.raises(RequestError, match="bits"):
        ClipSearch(weights=1)
    with pytest.raises(RequestError, match="power"):
        ClipSearch(power=0)
    with pytest.raises(RequestError, match="no linear layers"):
        ClipSearch().search(nn.Sequential(nn.ReLU()), [("0",)], batches)
    with pytest.raises(RequestError, match="not finite"):
        ClipSearch().search(net, [("0",)], [torch.full((1, 2, 64), math.nan)])
