"""Packed weights inside modules: their own forward, tied weights, copies and casts, and what is held."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from octavo.forms import Dense, Grid
from octavo.runtimes.packed import PackedWeight, held_bytes, kernel_for, kernels_of
from octavo.sources.sites import Layout


def packed(weight, kind="rows_first"):
    """A weight rounded to 4 bits a row, packed, and what it decodes to."""
    layout = Layout(kind)
    matrix = layout.to_matrix(weight.detach())
    scale = (matrix.abs().amax(1, keepdim=True) / 7).bfloat16()
    form = Grid((matrix / scale.float()).round().clamp(-8, 7).to(torch.int8), scale)
    made = PackedWeight(kernel_for(form), layout, tuple(weight.shape), weight.dtype)
    return nn.Parameter(made, requires_grad=False), layout.from_matrix(form.dense(), tuple(weight.shape))


class ScaledEmbedding(nn.Embedding):
    """As Gemma has it: a subclass with a forward of its own."""

    def forward(self, index):
        return super().forward(index) * torch.tensor(3.0, dtype=self.weight.dtype)


MODULES = {
    "linear": (lambda: nn.Linear(64, 50), lambda: torch.randn(3, 4, 64), "rows_first"),
    "linear of a part": (lambda: nn.Linear(64, 48, bias=False), lambda: torch.randn(3, 4, 64)[:, 1], "rows_first"),
    "conv1d of gpt-2": (lambda: Conv1D(48, 64), lambda: torch.randn(2, 5, 64), "columns_first"),
    "embedding": (lambda: nn.Embedding(70, 64), lambda: torch.randint(0, 70, (2, 9)), "rows_first"),
    "scaled embedding": (lambda: ScaledEmbedding(70, 64), lambda: torch.randint(0, 70, (9,)), "rows_first"),
    "convolution": (lambda: nn.Conv2d(16, 48, 2), lambda: torch.randn(2, 16, 5, 5), "rows_first"),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_runs_as_with_its_decoded_weight(name):
    torch.manual_seed(0)
    make, inputs, kind = MODULES[name]
    module, x = make(), inputs()
    weight, decoded = packed(module.weight, kind)
    dense = copy.deepcopy(module)
    dense.weight.data = decoded
    module.weight = weight
    with torch.inference_mode():
        expected, out = dense(x), module(x)
    assert type(out) is torch.Tensor and out.shape == expected.shape and out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=0, atol=0.02 * float(expected.abs().max()))
    torch.testing.assert_close(weight.data.decode(), decoded, rtol=0.01, atol=1e-3)


def test_functions_are_called_with_keywords():
    torch.manual_seed(0)
    weight, decoded = packed(torch.randn(48, 64))
    x = torch.randn(3, 64)
    torch.testing.assert_close(functional.linear(input=x, weight=weight), x @ decoded.T, rtol=0, atol=0.5)
    index = torch.tensor([3, 0])
    torch.testing.assert_close(functional.embedding(input=index, weight=weight), decoded[index], rtol=0.01, atol=1e-3)
    weight, decoded = packed(torch.randn(48, 16, 2, 2))
    image = torch.randn(1, 16, 4, 4)
    expected = functional.conv2d(image, decoded)
    torch.testing.assert_close(functional.conv2d(input=image, weight=weight), expected, rtol=0, atol=0.5)
    weight, decoded = packed(torch.randn(64, 48), "columns_first")
    bias = torch.ones(48)
    for scale in (1, 2):
        out = torch.addmm(input=bias, mat1=x, mat2=weight, beta=scale)
        torch.testing.assert_close(out, scale * bias + x @ decoded, rtol=0, atol=0.5)


def test_tied_weights_are_one_copy():
    model = nn.ModuleDict({"table": nn.Embedding(128, 64), "head": nn.Linear(64, 128, bias=False)})
    weight, _ = packed(model["table"].weight)
    model["table"].weight = model["head"].weight = weight
    # 4 bits a weight and, of bfloat16, a scale and an offset a group and row.
    assert held_bytes(model) == 128 * 64 // 2 + 128 * 4
    assert list(kernels_of(model).values()) == [["table.weight"]]


def test_kernels_are_named_by_what_uses_them():
    model = nn.ModuleDict({"table": nn.Embedding(128, 64), "linear": nn.Linear(64, 128), "conv": nn.Conv1d(64, 8, 2)})
    for name in model:
        model[name].weight, _ = packed(model[name].weight)
    names = {sites[0]: name for name, sites in kernels_of(model).items()}
    assert names["linear.weight"].startswith("int4")
    assert names["table.weight"].startswith("lookup")
    assert names["conv.weight"].startswith("none")


def test_copies_and_casts_stay_packed():
    linear = nn.Linear(64, 128)
    linear.weight, decoded = packed(linear.weight)
    before = held_bytes(linear)
    assert held_bytes(copy.deepcopy(linear)) == before
    narrow = copy.deepcopy(linear).to(torch.bfloat16).to("cpu").eval()
    assert isinstance(narrow.weight, PackedWeight) and narrow.weight.dtype == torch.bfloat16
    assert held_bytes(narrow) == before - 2 * 128
    x = torch.randn(2, 64)
    torch.testing.assert_close(narrow(x.bfloat16()).float(), x @ decoded.T + linear.bias, rtol=0.05, atol=0.05)


def test_anything_else_gets_the_decoded_weight():
    weight, decoded = packed(torch.randn(64, 64))
    torch.testing.assert_close(weight.abs().sum(), decoded.abs().sum(), rtol=1e-2, atol=0)
    torch.testing.assert_close(weight[3], decoded[3], rtol=0.01, atol=1e-3)
    assert "PackedWeight" in repr(weight.data) and tuple(weight.shape) == (64, 64)


def test_dense_weights_are_held_in_bfloat16():
    linear = nn.Linear(64, 64, bias=False)
    kernel = kernel_for(Dense(linear.weight.detach()))
    linear.weight = nn.Parameter(PackedWeight(kernel, Layout(), (64, 64), torch.float32), requires_grad=False)
    assert held_bytes(linear) == 2 * 64 * 64
