"""Sources and sites: every kind is recognised, matrices mean what they say, nothing is lost."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import octavo
from octavo.errors import RequestError
from octavo.sources.files import from_path
from octavo.sources.sites import Layout
from octavo.sources.source import SMALLEST_SITE, examine, from_module

TRANSPOSED = Layout("transposed")

#: Module, an input, the axis of the output's channels, and the kind and layout expected.
KINDS = {
    "linear": (lambda: nn.Linear(40, 24), (5, 40), -1, "linear", Layout()),
    "gpt2 conv1d": (lambda: Conv1D(24, 40), (5, 40), -1, "linear", Layout("columns_first")),
    "conv1d": (lambda: nn.Conv1d(12, 20, 5, padding=2), (2, 12, 9), 1, "convolution", Layout()),
    "conv2d": (lambda: nn.Conv2d(8, 12, (3, 5), stride=2, padding=1), (2, 8, 9, 11), 1, "convolution", Layout()),
    "conv3d": (lambda: nn.Conv3d(3, 8, 3), (2, 3, 5, 6, 5), 1, "convolution", Layout()),
    "grouped": (lambda: nn.Conv2d(16, 24, 3, groups=4), (2, 16, 6, 6), 1, "convolution", Layout()),
    "depthwise": (lambda: nn.Conv2d(64, 64, 3, groups=64, dilation=2), (2, 64, 7, 7), 1, "convolution", Layout()),
    "transposed 1d": (lambda: nn.ConvTranspose1d(12, 20, 4, stride=2), (2, 12, 6), 1, "convolution", TRANSPOSED),
    "transposed 2d": (lambda: nn.ConvTranspose2d(12, 20, 3, stride=2), (2, 12, 5, 4), 1, "convolution", TRANSPOSED),
    "transposed 3d": (lambda: nn.ConvTranspose3d(6, 8, 3), (2, 6, 3, 4, 3), 1, "convolution", TRANSPOSED),
    "transposed grouped": (
        lambda: nn.ConvTranspose2d(12, 20, 3, groups=2), (2, 12, 4, 5), 1, "convolution", Layout("transposed", 2),
    ),
    "transposed depthwise": (
        lambda: nn.ConvTranspose2d(64, 64, 3, groups=64), (2, 64, 4, 5), 1, "convolution", Layout("transposed", 64),
    ),
}  # fmt: skip


def only_site(module):
    sites, _ = from_module(module).sites()
    (site,) = sites
    return site


@pytest.mark.parametrize("name", KINDS)
def test_kind_and_layout_are_recognised(name):
    make, _, _, kind, layout = KINDS[name]
    module = make()
    site = only_site(module)
    assert (site.name, site.kind, site.layout) == ("weight", kind, layout)
    assert site.shape == tuple(module.weight.shape)
    assert site.parameters == module.weight.numel() == site.rows * site.columns


@pytest.mark.parametrize("name", KINDS)
def test_a_row_of_the_matrix_is_an_output_channel(name):
    make, shape, axis, *_ = KINDS[name]
    torch.manual_seed(0)
    module = make()
    site, x = only_site(module), torch.randn(shape)
    matrix = site.layout.to_matrix(module.weight.detach().clone())
    assert matrix.shape == (site.rows, site.columns)
    with torch.no_grad():
        before = module(x)
        assert before.shape[axis] == site.rows
        for row in (0, 1, site.rows // 2, site.rows - 1):
            changed = matrix.clone()
            changed[row] = 0
            module.weight.copy_(site.layout.from_matrix(changed, site.shape))
            moved = (module(x) - before).abs().movedim(axis, 0).flatten(1).amax(1) > 1e-6
            assert moved.nonzero().flatten().tolist() == [row]


@pytest.mark.parametrize("name", ["linear", "gpt2 conv1d"])
def test_a_column_of_a_linear_layer_is_an_input(name):
    make, shape, *_ = KINDS[name]
    torch.manual_seed(0)
    module = make()
    x = torch.randn(shape)
    matrix = only_site(module).layout.to_matrix(module.weight)
    torch.testing.assert_close(module(x), x @ matrix.T + module.bias)


@pytest.mark.parametrize("name", ["conv2d", "grouped", "depthwise"])
def test_the_columns_of_a_convolution_are_its_unfolded_patch(name):
    make, shape, *_ = KINDS[name]
    torch.manual_seed(0)
    module = make()
    x = torch.randn(shape)
    matrix = only_site(module).layout.to_matrix(module.weight)
    patches = nn.functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
    grouped = patches.unflatten(1, (module.groups, -1))
    product = torch.einsum("grc,ngcp->ngrp", matrix.unflatten(0, (module.groups, -1)), grouped)
    expected = module(x)
    got = product.flatten(1, 2).reshape(expected.shape) + module.bias[:, None, None]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["transposed 2d", "transposed grouped", "transposed depthwise"])
def test_the_columns_of_a_transposed_convolution_are_inputs_times_kernel(name):
    make, shape, *_ = KINDS[name]
    torch.manual_seed(0)
    module = make()
    x = torch.randn(shape)
    site = only_site(module)
    kernel = math.prod(module.kernel_size)
    groups = module.groups
    matrix = site.layout.to_matrix(module.weight).reshape(groups, site.rows // groups, shape[1] // groups, kernel)
    contributions = torch.einsum("goik,ngip->ngokp", matrix, x.flatten(2).unflatten(1, (groups, -1)))
    expected = module(x)
    folded = nn.functional.fold(
        contributions.reshape(shape[0], site.rows * kernel, -1),
        expected.shape[2:],
        module.kernel_size,
        stride=module.stride,
    )
    torch.testing.assert_close(folded + module.bias[:, None, None], expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(["rows_first", "columns_first", "transposed"]),
    groups=st.integers(1, 4),
    first=st.integers(1, 5),
    second=st.integers(1, 6),
    kernel=st.lists(st.integers(1, 4), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_layout_is_inverted_exactly(kind, groups, first, second, kernel, dtype):
    shape = (first, second) if kind == "columns_first" else (first * groups, second, *kernel)
    weight = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
    layout = Layout(kind, groups if kind == "transposed" else 1)
    matrix = layout.to_matrix(weight)
    assert tuple(matrix.shape) == layout.matrix_shape(shape)
    assert matrix.is_contiguous()
    back = layout.from_matrix(matrix, shape)
    assert torch.equal(back, weight) and back.dtype == dtype
    assert sorted(matrix.flatten().tolist()) == sorted(weight.flatten().tolist())


def test_embedding_rows_are_tokens():
    module = nn.Embedding(50, 16)
    site = only_site(module)
    assert (site.kind, site.rows, site.columns) == ("embedding", 50, 16)
    matrix = site.layout.to_matrix(module.weight)
    torch.testing.assert_close(module(torch.tensor([7, 3])), matrix[[7, 3]])


class Mixed(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.big = nn.Linear(32, 32, dtype=dtype)
        self.small = nn.Linear(4, 4, dtype=dtype)
        self.norm = nn.BatchNorm1d(32, dtype=dtype)
        self.scale = nn.Parameter(torch.tensor(2.5, dtype=dtype))
        self.register_buffer("places", torch.arange(40).reshape(5, 8))
        self.register_buffer("mask", torch.ones(30, 30, dtype=torch.bool).tril())


def test_every_tensor_is_a_site_or_has_a_reason():
    source = from_module(Mixed())
    sites, reasons = source.sites()
    assert [site.name for site in sites] == ["big.weight"]
    assert set(reasons) | {"big.weight"} == set(Mixed().state_dict())
    assert "1-d" in reasons["big.bias"] and "0-d" in reasons["scale"]
    assert str(SMALLEST_SITE) in reasons["small.weight"]
    for name in ("places", "mask", "norm.num_batches_tracked"):
        assert "not a floating" in reasons[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_original_bytes_are_those_at_the_stored_precision(dtype):
    source = from_module(Mixed(dtype))
    expected = sum(t.numel() * t.element_size() for t in Mixed(dtype).state_dict().values())
    assert source.original_bytes == expected
    assert source.sites()[0][0].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("as_file", [False, True])
def test_every_tensor_ends_in_the_artifact_in_its_shape_and_dtype(tmp_path, dtype, as_file):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(96, 96), nn.BatchNorm1d(96), nn.Linear(96, 96), Mixed()).to(dtype)
    state = module.state_dict()
    source = module
    if as_file:
        source = tmp_path / "bare.safetensors"
        save_file(state, source)
    octavo.compress(source, ratio=2, methods=["entropy"]).save(tmp_path / "out", report=False)
    restored = octavo.load(tmp_path / "out")
    assert set(restored) == set(state)
    for name, tensor in state.items():
        assert restored[name].shape == tensor.shape and restored[name].dtype == tensor.dtype, name
        if not tensor.is_floating_point():
            assert torch.equal(restored[name], tensor)
        else:
            torch.testing.assert_close(restored[name].float(), tensor.float(), rtol=0.05, atol=0.05)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(64, 32)
        self.inner = nn.Linear(32, 32)
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(self.inner(self.table(x)))


def test_tied_tensors_of_a_module_are_stored_once_and_stay_tied(tmp_path):
    module = Tied()
    source = from_module(module)
    assert source.aliases == {"head.weight": "table.weight"}
    assert "head.weight" not in source.shapes
    (site,) = (site for site in source.sites()[0] if site.name == "table.weight")
    assert (site.kind, site.tied) == ("embedding", ("head.weight",))
    octavo.compress(module, ratio=2).save(tmp_path / "out", report=False)
    state = octavo.load(tmp_path / "out")
    assert state["head.weight"].data_ptr() == state["table.weight"].data_ptr()
    assert octavo.Artifact(tmp_path / "out").names().count("head.weight") == 0
    fresh = octavo.load(tmp_path / "out", into=Tied())
    assert fresh.head.weight is fresh.table.weight
    assert torch.equal(fresh.head.weight, state["table.weight"])


def test_tied_tensors_of_a_file_are_found_by_content(tmp_path):
    torch.manual_seed(0)
    table, other = torch.randn(64, 32), torch.randn(64, 32)
    almost = table.clone()
    almost[40, 3] += 1
    save_file({"a": table, "b": other, "c": table.clone(), "d": almost}, tmp_path / "m.safetensors")
    source = from_path(tmp_path / "m.safetensors")
    assert source.aliases == {"c": "a"}
    assert source.original_bytes == 3 * 64 * 32 * 4
    octavo.compress(tmp_path / "m.safetensors", ratio=2).save(tmp_path / "out", report=False)
    state = octavo.load(tmp_path / "out")
    assert set(state) == {"a", "b", "c", "d"}
    assert state["c"].data_ptr() == state["a"].data_ptr()


def test_a_transposed_view_is_not_taken_for_a_tie(tmp_path):
    module = nn.Module()
    module.forth = nn.Parameter(torch.randn(32, 32))
    module.back = nn.Parameter(module.forth.data.t())
    octavo.compress(module, ratio=1.01, methods=["keep", "entropy"]).save(tmp_path / "out", report=False)
    state = octavo.load(tmp_path / "out")
    torch.testing.assert_close(state["back"], module.back.data, rtol=0.05, atol=0.05)
    torch.testing.assert_close(state["forth"], module.forth.data, rtol=0.05, atol=0.05)


def test_heads_and_embeddings_of_transformers_are_recognised(tmp_path):
    small = {"vocab_size": 64, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**small, tie_word_embeddings=False)).save_pretrained(tmp_path / "untied")
    GPT2LMHeadModel(GPT2Config(**small)).save_pretrained(tmp_path / "tied")
    untied = {site.name: site for site in from_path(tmp_path / "untied").sites()[0]}
    assert untied["lm_head.weight"].kind == "head"
    assert untied["transformer.wte.weight"].kind == "embedding"
    assert untied["transformer.h.0.attn.c_attn.weight"].layout == Layout("columns_first")
    tied = from_path(tmp_path / "tied")
    assert "lm_head.weight" not in tied.shapes
    assert {site.name: site.kind for site in tied.sites()[0]}["transformer.wte.weight"] == "embedding"


def test_the_base_model_prefix_does_not_hide_the_owner(tmp_path):
    # A checkpoint written by a class with a head, read into its base class, differs by a prefix.
    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    data["architectures"] = ["BertModel"]
    (tmp_path / "config.json").write_text(json.dumps(data))
    source = from_path(tmp_path)
    sites = {site.name: site for site in source.sites()[0]}
    assert sites["bert.embeddings.word_embeddings.weight"].kind == "embedding"
    assert source.parameters["bert.embeddings.word_embeddings.weight"] == "embeddings.word_embeddings.weight"


def test_without_code_kinds_are_told_from_names_and_shapes(tmp_path):
    tensors = {
        "word_embeddings.weight": torch.randn(64, 16),
        "dense.weight": torch.randn(40, 16),
        "conv.weight": torch.randn(8, 8, 3, 3),
        "bias": torch.randn(8),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    sites, reasons = from_path(tmp_path / "m.safetensors").sites()
    assert {site.name: site.kind for site in sites} == {
        "word_embeddings.weight": "embedding", "dense.weight": "linear", "conv.weight": "convolution",
    }  # fmt: skip
    assert list(reasons) == ["bias"]


def sharded(folder):
    torch.manual_seed(0)
    one, two = {"a": torch.randn(40, 40)}, {"b": torch.randn(40, 40), "c": torch.randn(40)}
    save_file(one, folder / "model-00001-of-00002.safetensors")
    save_file(two, folder / "model-00002-of-00002.safetensors")
    where = {
        **dict.fromkeys(one, "model-00001-of-00002.safetensors"),
        **dict.fromkeys(two, "model-00002-of-00002.safetensors"),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return {**one, **two}


@pytest.mark.parametrize("name", ["", "model.safetensors.index.json"])
def test_shards_are_one_source(tmp_path, name):
    tensors = sharded(tmp_path)
    source = from_path(tmp_path / name)
    assert set(source.shapes) == set(tensors)
    assert all(torch.equal(source.read(key), value) for key, value in tensors.items())


def test_bad_sources_are_refused_by_name(tmp_path):
    with pytest.raises(RequestError, match="nowhere"):
        from_path(tmp_path / "nowhere")
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(RequestError, match=r"weights\.bin"):
        from_path(tmp_path / "weights.bin")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(RequestError, match=r"cut\.safetensors.*truncated"):
        from_path(tmp_path / "cut.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="empty"):
        from_path(tmp_path / "empty")
    with pytest.raises(RequestError, match="ReLU"):
        from_module(nn.ReLU())
    folder = tmp_path / "shards"
    folder.mkdir()
    sharded(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(RequestError, match="model-00002-of-00002"):
        from_path(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(RequestError, match="not an index"):
        from_path(folder)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_named_with_their_place(value, dtype):
    module = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30)).to(dtype)
    module[1].weight.data[3, 17] = value
    with pytest.raises(RequestError, match=r"'1\.weight' holds -?(nan|inf) at \(3, 17\)"):
        examine(from_module(module))


def test_the_fingerprint_follows_names_dtypes_and_contents():
    torch.manual_seed(0)
    module = Mixed()
    first = from_module(module).fingerprint()
    assert from_module(module).fingerprint() == first
    module.big.weight.data[0, 0] += 1e-3
    assert from_module(module).fingerprint() != first
    assert (
        from_module(nn.Sequential(nn.Linear(4, 4))).fingerprint()
        != from_module(nn.ModuleDict({"x": nn.Linear(4, 4)})).fingerprint()
    )


@pytest.mark.parametrize("values", [(0.0, 1.0), (1.0, 0.0), (float("-inf"), 0.0), (0.0, -1e9), (-1.0, 1.0)])
def test_masks_are_stored_exactly_and_small(tmp_path, values):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64)
            self.register_buffer("mask", torch.full((64, 64), values[0]))
            self.mask[torch.ones(64, 64).tril().bool()] = values[1]

        def forward(self, x):
            return self.layer(x) * self.mask.clamp(-1, 1)[: len(x)]

    done = octavo.compress(Masked(), ratio=4, data=[torch.randn(32, 64)], preset="fast", objective="squared")
    report = done.save(tmp_path / "out")
    row = next(row for row in report.kept if row.name == "mask")
    assert "a mask" in row.reason and row.bytes <= 64 * 64 / 8
    assert torch.equal(octavo.load(tmp_path / "out", into=Masked()).mask, Masked().mask)


def test_trained_weights_of_two_values_are_compressed_like_others():
    layer = nn.Linear(64, 64)
    layer.weight.data.copy_(torch.randn(64, 64).sign())
    assert "weight" in [site.name for site in octavo.compress(layer, ratio=8, preset="data-free").opened.sites]
