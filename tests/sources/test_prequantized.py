"""Folders of other quantizers: what their codes stand for, whose bytes count, and what is refused."""

import json

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file

import octavo
from octavo.errors import RequestError
from octavo.sources.files import from_path

GROUP = 32


def llama():
    torch.manual_seed(0)
    config = T.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return T.LlamaForCausalLM(config).half()


def words(codes, bits):
    """Unsigned codes (rows, columns) in 32-bit words along the columns, as one stream of bits."""
    ones = (codes.long()[..., None] >> torch.arange(bits)) & 1
    ones = ones.flatten(1).unflatten(1, (-1, 32))
    unsigned = (ones << torch.arange(32)).sum(-1)
    return (unsigned - ((unsigned >> 31) << 32)).int()


def grouped(weight, bits):
    """Codes, zeros and scales of groups of columns: (out, in), (out, groups), (out, groups) float16."""
    parts = weight.float().unflatten(1, (-1, GROUP))
    low, high = parts.amin(2).clamp(max=0), parts.amax(2).clamp(min=0)
    scales = ((high - low) / (2**bits - 1)).half()
    # The first version of GPTQ cannot store a zero of 0.
    zeros = (-low / scales.float()).round().clamp(1, 2**bits - 1).long()
    codes = (parts / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 2**bits - 1).long().flatten(1)
    spread = torch.arange(weight.shape[1]) // GROUP
    return codes, zeros, scales, (codes - zeros[:, spread]).float() * scales.float()[:, spread]


def gptq(weight, bits=4, shuffled=False):
    codes, zeros, scales, floats = grouped(weight, bits)
    group = torch.arange(weight.shape[1]) // GROUP
    if shuffled:
        order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0))
        codes, floats, group = codes[:, order], floats[:, order], group[order]
    parts = {"qweight": words(codes, bits).t().contiguous(), "qzeros": words(zeros.t() - 1, bits)}
    return {**parts, "scales": scales.t().contiguous(), "g_idx": group.int()}, floats


def awq(weight):
    codes, zeros, scales, floats = grouped(weight, 4)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def packed(values):
        return words(values.unflatten(1, (-1, 8))[..., order].flatten(1), 4)

    return {"qweight": packed(codes.t()), "qzeros": packed(zeros.t()), "scales": scales.t().contiguous()}, floats


def packed(weight, bits=4):
    codes, zeros, scales, floats = grouped(weight, bits)
    stored = {"weight_packed": words(codes, bits), "weight_scale": scales, "weight_shape": torch.tensor(weight.shape)}
    return {**stored, "weight_zero_point": words(zeros.t(), bits).t().contiguous()}, floats


def rowwise(weight):
    scales = (weight.float().abs().amax(1, keepdim=True) / 127).half()
    codes = (weight.float() / scales.float()).round().to(torch.int8)
    return {"weight": codes, "weight_scale": scales}, codes.float() * scales.float()


def float8(weight):
    scale = weight.float().abs().amax() / 448
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scale.reshape(1, 1)}, codes.float() * scale


def eight(weight):
    most = weight.float().abs().amax(1)
    codes = (weight.float() / most[:, None] * 127).round().to(torch.int8)
    kept = {"weight": codes, "SCB": most, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return kept, codes.float() * (most[:, None] / 127)


def four(weight):
    table = torch.linspace(-1, 1, 16) ** 3
    blocks = weight.float().reshape(-1, 64)
    most = blocks.abs().amax(1)
    outer_table, offset = torch.linspace(-1, 1, 256), float(most.mean())
    outer = (most - offset).abs().amax().reshape(1)
    nested = ((most - offset)[:, None] / outer - outer_table).abs().argmin(1)
    scales = outer_table[nested] * outer + offset
    codes = (blocks[..., None] / most[:, None, None] - table).abs().argmin(-1).flatten()
    about = {"quant_type": "nf4", "blocksize": 64, "shape": list(weight.shape), "nested_blocksize": 256,
             "nested_offset": offset, "dtype": "float16"}  # fmt: skip
    state = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    stored = {
        "weight": (codes[::2] << 4 | codes[1::2]).to(torch.uint8)[:, None], "weight.absmax": nested.to(torch.uint8),
        "weight.quant_map": table, "weight.nested_absmax": outer, "weight.nested_quant_map": outer_table,
        "weight.quant_state.bitsandbytes__nf4": state,
    }  # fmt: skip
    return stored, (table[codes].reshape(-1, 64) * scales[:, None]).reshape(weight.shape)


WIDE = {"config_groups": {"all": {"weights": {"num_bits": 4}}}}
FORMATS = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP}),
    "gptq of 3 bits": (lambda weight: gptq(weight, 3), {"quant_method": "gptq", "bits": 3, "group_size": GROUP}),
    "gptq by activation": (lambda weight: gptq(weight, 4, True), {"quant_method": "gptq", "bits": 4, "desc_act": True}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}),
    "packed": (packed, {"quant_method": "compressed-tensors", "format": "pack-quantized", **WIDE}),
    "integers": (rowwise, {"quant_method": "compressed-tensors", "format": "int-quantized"}),
    "float8": (float8, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "8 bits of bitsandbytes": (eight, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "4 bits of bitsandbytes": (four, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
}


def written(name, folder):
    """A quantized model in a folder, and its floats."""
    quantize, config = FORMATS[name]
    folder.mkdir()
    model = llama()
    stored, floats = {}, {}
    for key, value in model.state_dict().items():
        if key.endswith("proj.weight"):
            parts, floats[key] = quantize(value)
            stored.update((f"{key.removesuffix('.weight')}.{part}", tensor) for part, tensor in parts.items())
        else:
            stored[key], floats[key] = value.clone(), value.float()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    about = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"], "quantization_config": config}
    (folder / "config.json").write_text(json.dumps(about, default=str))
    return folder, floats


@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_read_as_the_floats_that_they_stand_for(name, tmp_path):
    folder, floats = written(name, tmp_path / "quantized")
    source = from_path(folder)
    held = load_file(folder / "model.safetensors")
    assert source.original_bytes == sum(tensor.nbytes for tensor in held.values())
    assert source.title == "quantized" and not source.unfilled and not source.unused
    assert set(source.shapes) == set(floats)
    for key, expected in floats.items():
        torch.testing.assert_close(source.read(key).float(), expected, rtol=1e-6, atol=1e-7)
    assert any("already quantized" in note for note in source.notes)


@pytest.mark.parametrize("name", ["gptq", "integers"])
def test_the_grid_is_kept_and_the_artifact_is_an_ordinary_model(name, tmp_path):
    folder, floats = written(name, tmp_path / "quantized")
    done = octavo.compress(folder, size="90kB", preset="data-free", methods=["source-grid", "keep"], progress=False)
    done.save(tmp_path / "out", report=False)
    assert {point.method for point in done.built.plan.points.values()} == {"source-grid", "keep"}
    tensors = octavo.load(tmp_path / "out").state_dict()
    assert all(torch.equal(tensors[key], value.half()) for key, value in floats.items() if "proj" in key)
    assert "gptq" not in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quant_method": "hqq"}, r"config.json: the model is quantized by hqq, which is not read; give the original"),
        ({"quant_method": "awq", "version": "gemv"}, "stored as AWQ gemv of 4 bits; gemm of 4 bits is read"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "the format marlin-24 of compressed-tensors"),
        ({"quant_method": "gptq", "bits": 5}, "has codes of 5 bits; 2, 3, 4 and 8 are read"),
        ({"quant_method": "gptq", "bits": "four"}, "quantization_config cannot be read"),
        ({"quant_method": "octavo"}, "already compressed; give the original folder instead"),
        ({}, None),
    ],
)
def test_other_quantizers_are_refused_by_name(config, says, tmp_path):
    folder, _ = written("gptq", tmp_path / "quantized")
    about = json.loads((folder / "config.json").read_text()) | {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(about))
    if says is None:
        # Nothing says that the codes are codes.
        assert from_path(folder).unfilled
        return
    with pytest.raises(RequestError, match=says):
        from_path(folder)


def test_parts_that_do_not_fit_together_are_named(tmp_path):
    folder, _ = written("gptq", tmp_path / "quantized")
    held = load_file(folder / "model.safetensors")
    held["model.layers.0.mlp.up_proj.scales"] = torch.ones(3, 5).half()
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RequestError, match=r"parts of 'model.layers.0.mlp.up_proj.weight' do not fit together"):
        from_path(folder)
