"""What is no site is stored in 16 bits only where each value survives it, unless data say that it costs nothing."""

import pytest
import torch
from torch import nn

import octavo
from octavo.sources.narrowing import Narrowing, stored_dtype


class Scaled(nn.Module):
    """A layer whose inputs are divided by a constant."""

    def __init__(self, value=1e-9):
        super().__init__()
        self.register_buffer("std", torch.full((64,), value))
        self.layer, self.head = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x):
        return self.head(torch.relu(self.layer(x / self.std)))


class LayerScale(nn.Module):
    def __init__(self, value=1e-6):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((64,), value) * torch.linspace(0.5, 1.5, 64))
        self.layer = nn.Linear(64, 64)

    def forward(self, x):
        return self.gamma * self.layer(x)


class Stabilised(nn.Module):
    """A constant that no data show: without it a row of zeros gives NaN."""

    def __init__(self):
        super().__init__()
        self.register_buffer("eps", torch.tensor(1e-12))
        self.layer = nn.Linear(64, 64)

    def forward(self, x):
        return self.layer(x) / (x.norm(dim=-1, keepdim=True) + self.eps)


def restored(make, folder, **request):
    torch.manual_seed(0)
    module = make()
    octavo.compress(module, ratio=4, **request).save(folder / "out")
    return module, octavo.load(folder / "out", into=make())


@pytest.mark.parametrize("value", [1e-9, 3.3e-6, 1e-38, 7e4, 1e9])
def test_constants_beyond_half_precision_survive_without_data(tmp_path, value):
    module, found = restored(lambda: Scaled(value), tmp_path, preset="data-free")
    torch.testing.assert_close(found.std, module.std, rtol=2**-10, atol=0)
    assert bool(found(torch.randn(4, 64) * value).isfinite().all())


@pytest.mark.parametrize("request_", [{"preset": "data-free"}, {"preset": "fast"}], ids=["data-free", "data"])
def test_layer_scale_survives(tmp_path, request_):
    if request_["preset"] == "fast":
        request_ = {**request_, "data": [torch.randn(64, 64)], "objective": "squared"}
    module, found = restored(LayerScale, tmp_path, **request_)
    torch.testing.assert_close(found.gamma, module.gamma, rtol=2**-10, atol=0)


def test_what_data_do_not_show_survives(tmp_path):
    _, found = restored(Stabilised, tmp_path, preset="fast", data=[torch.randn(64, 64)], objective="squared")
    assert float(found.eps) == pytest.approx(1e-12, rel=2**-10)
    assert bool(found(torch.zeros(1, 64)).isfinite().all())


def test_each_tensor_is_decided_alone(tmp_path):
    class Both(Scaled):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(64)
            nn.init.normal_(self.norm.weight, 1, 0.1)

    _, found = restored(Both, tmp_path, preset="data-free")
    kept = octavo.Artifact(tmp_path / "out")
    assert kept._tensors["norm.weight"].dtype == torch.float16 and kept._tensors["std"].dtype == torch.float32
    assert float(found.std[0]) == pytest.approx(1e-9, rel=1e-6)


VECTORS = {
    "ones": (torch.ones(8), torch.float16, torch.float16),
    "norm": (torch.linspace(0.3, 1.7, 8), torch.float16, torch.float16),
    "mask": (torch.tensor([0.0, float("-inf")]), torch.float16, torch.float16),
    "not finite": (torch.tensor([0.1, float("-inf")]), torch.float32, torch.float32),
    "large": (torch.tensor([0.1, 1.234e9]), torch.bfloat16, torch.bfloat16),
    "largest": (torch.tensor([0.1, torch.finfo(torch.float32).max]), torch.float32, torch.float32),
    "tiny among large": (torch.tensor([0.1, 0.3, 1e-7]), torch.bfloat16, torch.float16),
    "tiny": (torch.tensor([1.1e-7, 2.3e-7, 0.0]), torch.float32, torch.float32),
    "double": (torch.tensor([1e-200, 0.1], dtype=torch.float64), torch.float64, torch.float16),
    "half": (torch.tensor([0.1]).half(), torch.float16, torch.float16),
    "brain": (torch.tensor([0.1]).bfloat16(), torch.bfloat16, torch.bfloat16),
    "eight bits": (torch.tensor([0.1]).to(torch.float8_e4m3fn), torch.float8_e4m3fn, torch.float8_e4m3fn),
    "empty": (torch.zeros(0), torch.float16, torch.float16),
}


@pytest.mark.parametrize("name", VECTORS)
def test_the_dtype_follows_the_values(name):
    tensor, each, scale = VECTORS[name]
    assert (stored_dtype(tensor, Narrowing.EACH), stored_dtype(tensor, Narrowing.SCALE)) == (each, scale)
    exact = stored_dtype(tensor, Narrowing.EXACT)
    assert torch.equal(tensor.float().to(exact).float(), tensor.float()) or exact == tensor.dtype
