"""An exported file gives the outputs of what it was exported from, and says how it runs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import octavo
from octavo.cli import app
from octavo.runtimes.onnx.kernels import FLOAT, INT8
from octavo.runtimes.onnx.sessions import Session


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "gemma"])
def test_models_of_every_kind(kind: str, models: dict[str, Path], sentences: list[str], tmp_path: Path) -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    result = octavo.export(models[kind], tmp_path / "model.onnx", data=sentences)
    assert result.difference <= result.tolerance
    assert set(result.kernels.values()) == {FLOAT}
    assert result.divergence.mean < 1e-6
    # Other lengths than it was traced with, and padding.
    model = (AutoModel if kind == "bert" else AutoModelForCausalLM).from_pretrained(models[kind]).eval()
    tokens = torch.randint(0, 100, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1, 7:] = 0
    session = Session(tmp_path / "model.onnx")
    with torch.inference_mode():
        wanted = model(input_ids=tokens, attention_mask=mask)[0]
    found = session(input_ids=tokens, attention_mask=mask)[session.names[0]]
    assert torch.allclose(found[mask.bool()], wanted[mask.bool()], rtol=1e-3, atol=1e-4)


def test_an_artifact_runs_from_its_own_codes(models: dict[str, Path], sentences: list[str], tmp_path: Path) -> None:
    import onnx

    folded = tmp_path / "folded"
    octavo.compress(models["llama"], ratio=2, data=sentences, keep={"*": "int8:smoothing=0.5"}).save(
        folded, report=False
    )
    slower = octavo.export(folded, tmp_path / "float.onnx", data=sentences, loss=0.0, prefer="speed")
    assert set(slower.kernels.values()) == {FLOAT}
    assert slower.divergence.mean < 1e-6
    result = octavo.export(folded, tmp_path / "model.onnx", data=sentences, prefer="speed")
    # Which kernel is faster depends on the machine; those that are named are those in the file.
    stored = {tensor.name: tensor for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer}
    for name, kernel in result.kernels.items():
        dtype = onnx.TensorProto.INT8 if kernel == INT8 or "embed" in name else onnx.TensorProto.FLOAT
        assert name not in stored or stored[name].data_type == dtype
    assert result.divergence.mean < 0.05


def test_the_command_writes_and_tells(models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    words = ["export", str(models["bert"]), str(out), "--shape", "2x8"]
    said = CliRunner().invoke(app, [*words, "--json"])
    assert said.exit_code == 0, said.output
    result = json.loads(said.stdout)
    assert result["bytes"] == out.stat().st_size
    assert result["latency"]["shape"] == [2, 8]
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 2
    assert "--overwrite" in again.output
    told = CliRunner().invoke(app, [*words, "--overwrite"])
    assert "on float32" in told.output
    assert "times as fast" in told.output


def test_what_cannot_be_exported_is_told(models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    bare = tmp_path / "bare.safetensors"
    save_file({"weight": torch.randn(64, 48)}, bare)
    with pytest.raises(octavo.RequestError, match="bare tensors have no graph"):
        octavo.export(bare, out)
    with pytest.raises(octavo.RequestError, match="choose from onnx"):
        octavo.export(models["bert"], out, to="gguf")
    with pytest.raises(octavo.RequestError, match="such as 1x32"):
        octavo.export(models["bert"], out, shape="32")
    with pytest.raises(octavo.RequestError, match="64 positions"):
        octavo.export(models["bert"], out, shape="1x65")
    assert not out.exists()


def test_a_missing_extra_is_named(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(octavo.MissingExtraError, match=r"octavo\[onnx\]"):
        octavo.export(models["bert"], tmp_path / "model.onnx")


def test_a_damaged_artifact_is_not_exported(models: dict[str, Path], sentences: list[str], tmp_path: Path) -> None:
    folded = tmp_path / "folded"
    octavo.compress(models["bert"], ratio=1.5, data=sentences, methods=["keep"]).save(folded)
    broken = shutil.copytree(folded, tmp_path / "broken")
    content = bytearray((broken / "model.safetensors").read_bytes())
    content[-9] ^= 1
    (broken / "model.safetensors").write_bytes(content)
    with pytest.raises(octavo.OctavoError, match="damaged"):
        octavo.export(broken, tmp_path / "model.onnx", data=sentences)
    assert not (tmp_path / "model.onnx").exists()
