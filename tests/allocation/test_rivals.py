"""What a plan is held against: one setting for all, and plain round-to-nearest at the same bytes."""

import pytest
import torch
from torch import nn

import octavo
from octavo.errors import BudgetError
from octavo.methods import get_method

BITS = (8, 6, 5, 4, 3, 2)


class Sided(nn.Module):
    """A core, layers beside it that hardly matter, and a large head: what no hook sees is easily weighed wrong."""

    def __init__(self, core, width):
        super().__init__()
        self.core, self.head = core, nn.Linear(width, 512)
        self.side = nn.ModuleList(nn.Linear(width, width) for _ in range(6))

    def forward(self, x):
        hidden = self.inner(x)
        for layer in self.side:
            hidden = hidden + 1e-3 * layer(hidden)
        return self.head(hidden)


class Recurrent(Sided):
    def inner(self, x):
        return self.core(x)[0][:, -1]


class Attention(Sided):
    def inner(self, x):
        return self.core(x, x, x, need_weights=False)[0].mean(1)


class Direct(Sided):
    """Matrices that a forward reads itself."""

    def inner(self, x):
        return torch.tanh(x[:, 0] @ self.core[0].t()) @ self.core[1].t()


MODELS = {
    "lstm": lambda: Recurrent(nn.LSTM(24, 32, 2, batch_first=True), 32),
    "attention": lambda: Attention(nn.MultiheadAttention(24, 4, batch_first=True), 24),
    "direct": lambda: Direct(nn.ParameterList([torch.randn(96, 24) / 6, torch.randn(32, 96) / 10]), 32),
}
DATA = [torch.randn(16, 12, 24, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def plain(module, request):
    """Round-to-nearest with the most bits that fit, all sites alike."""
    for bits in BITS:
        try:
            done = octavo.compress(module, **request, keep={"*": f"rtn:bits={bits},group=64"})
        except BudgetError:
            continue
        return done
    raise AssertionError("not even two bits fit")


@pytest.mark.parametrize("name", MODELS)
def test_no_plan_is_worse_than_round_to_nearest_at_the_same_bytes(name):
    torch.manual_seed(0)
    module = MODELS[name]().eval()
    request = {"ratio": 6, "data": DATA, "objective": "squared", "preset": "fast"}
    done, rival = octavo.compress(module, **request), plain(module, request)
    assert rival.built.bytes <= done.budget.bytes and done.built.bytes <= done.budget.bytes
    assert done.built.quality <= rival.built.quality * (1 + 1e-6)
    assert done.rival is None or done.built.quality <= done.rival.quality


def test_methods_that_were_named_are_obeyed():
    torch.manual_seed(0)
    module = MODELS["lstm"]().eval()
    done = octavo.compress(module, ratio=6, data=DATA, objective="squared", preset="fast", methods=["entropy"])
    assert {point.method for point in done.built.plan.points.values()} == {"entropy"}


def test_a_sites_own_choice_is_kept_by_every_rival():
    torch.manual_seed(0)
    module = MODELS["lstm"]().eval()
    done = octavo.compress(
        module, ratio=5, data=DATA, objective="squared", methods=["rtn", "keep"], preset="fast",
        keep={"side.0.weight": "float16"},
    )  # fmt: skip
    for built in (done.built, done.rival):
        assert built.plan.points["side.0.weight"].setting == {"dtype": "float16"}


@pytest.mark.parametrize("methods", [["rtn", "keep"], ["gptq", "keep"], ["rtn", "gptq", "keep"]], ids="+".join)
def test_dense_storage_screens_nobody_out(methods):
    """In fewer bytes than 16 bits take, nothing loses as little; that is no reason to try one setting only."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    data = [torch.randn(32, 64) for _ in range(4)]
    for ratio in (4.5, 8):
        done = octavo.compress(module, ratio=ratio, data=data, objective="squared", preset="fast", methods=methods)
        assert done.built.counted <= done.budget.bytes
    for curve in done.profile.curves:
        for name in methods[:1]:
            assert len([point for point in curve.points if point.method == name]) > 1


def test_a_uniform_rival_has_its_setting_wherever_it_is_offered():
    """Settings that were screened out at some sites are tried there for the rival that could win with them."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64)).eval()
    data = [torch.randn(32, 64) for _ in range(4)]
    done = octavo.compress(module, ratio=6, data=data, objective="squared", preset="fast", methods=["gptq", "rtn"])
    assert done.rival is not None
    name, points = done.rival.plan.label.split()[0], done.rival.plan.points.values()
    assert {point.method for point in points} == {name}
    settings = [point.setting for point in points]
    assert all(setting == settings[0] for setting in settings) and settings[0] in get_method(name).settings(None, None)
