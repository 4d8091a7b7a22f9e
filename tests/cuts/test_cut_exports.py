"""Cut models in other runtimes: ONNX and GGUF files are made of them as of any model."""

import pytest
import torch

import octavo
from octavo.cuts.structured import Structured

transformers = pytest.importorskip("transformers")


def wide_llama():
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def tokens(examples=24):
    return [{"input_ids": torch.randint(0, 96, (examples, 16), generator=torch.Generator().manual_seed(0))}]


@pytest.fixture(scope="module")
def thinner(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut") / "thinner"
    cut = Structured(("head", "neuron"), "magnitude")
    octavo.compress(wide_llama(), ratio=1.3, data=tokens(), methods=[cut], progress=False).save(folder, progress=False)
    return folder


def logits(model):
    with torch.no_grad():
        return model(**tokens(4)[0]).logits


def test_a_wide_place_keeps_a_multiple_of_32_units(thinner):
    model = transformers.AutoModelForCausalLM.from_pretrained(thinner)
    widths = [layer.mlp.up_proj.out_features for layer in model.model.layers]
    assert all(0 < width < 512 and width % 32 == 0 for width in widths)


def test_gguf_types_fit_a_cut_model(thinner, tmp_path):
    pytest.importorskip("gguf")
    done = octavo.compress(thinner, target="gguf", bits=8.6, data=tokens(), preset="fast", progress=False)
    report = done.save(tmp_path / "out", progress=False)
    assert not any("keep 16 bits" in warning for warning in report.calibration.warnings)
    before = logits(transformers.AutoModelForCausalLM.from_pretrained(thinner, dtype=torch.float32))
    after = logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf"))
    assert float((after - before).norm() / before.norm()) < 0.02


def test_onnxruntime_runs_a_cut_model(thinner, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    octavo.export(thinner, tmp_path / "cut.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "cut.onnx")
    given = {"input_ids": tokens(4)[0]["input_ids"], "attention_mask": torch.ones(4, 16, dtype=torch.long)}
    names = {entry.name for entry in session.get_inputs()}
    made = session.run(None, {name: value.numpy() for name, value in given.items() if name in names})[0]
    expected = logits(transformers.AutoModelForCausalLM.from_pretrained(thinner, dtype=torch.float32))
    assert torch.allclose(torch.from_numpy(made), expected, atol=1e-4)
