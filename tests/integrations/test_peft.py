"""Adapters of ``peft``: a folder with their two files is a source, and what is restored is such a folder again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import octavo
from octavo.errors import RequestError

RANK, WIDTH, LAYERS = 16, 192, 4
CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["query", "value"], "bias": "none"}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A folder as ``save_pretrained`` writes it, with weights of decaying size."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for layer in range(LAYERS):
        for part in ("query", "value"):
            name = f"base_model.model.encoder.layer.{layer}.attention.self.{part}"
            weights[f"{name}.lora_A.weight"] = torch.randn(RANK, WIDTH, generator=generator) / 8
            weights[f"{name}.lora_B.weight"] = torch.randn(WIDTH, RANK, generator=generator) / 100
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.mark.parametrize(("ratio", "error"), [(6, 0.35), (20, 1.0)])
def test_an_adapter_is_compressed_and_restored(adapter: Path, tmp_path: Path, ratio: float, error: float) -> None:
    report = octavo.compress(adapter, ratio=ratio, preset="fast").save(tmp_path / "small")
    assert report.artifact.ratio >= ratio
    assert json.loads((tmp_path / "small" / "adapter_config.json").read_text()) == CONFIG
    found, wanted = octavo.load(tmp_path / "small"), load_file(adapter / "adapter_model.safetensors")
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in wanted.items()
    }
    lost = sum(float((found[name] - wanted[name]).square().sum() / wanted[name].square().sum()) for name in wanted)
    assert lost / len(wanted) < error**2
    octavo.verify(tmp_path / "small")


def test_the_config_is_part_of_the_artifact(adapter: Path, tmp_path: Path) -> None:
    octavo.compress(adapter, ratio=4, preset="fast", methods=["rtn"]).save(tmp_path / "small")
    (tmp_path / "small" / "adapter_config.json").write_text("{}")
    with pytest.raises(octavo.ArtifactError, match=r"adapter_config.json was changed"):
        octavo.verify(tmp_path / "small")


def test_an_adapter_without_its_config_or_weights_is_refused(adapter: Path) -> None:
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(RequestError, match="adapter"):
        octavo.compress(adapter, ratio=4, preset="data-free")


def test_peft_loads_what_is_restored(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=96, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    )
    base = transformers.BertModel(config).eval()
    base.save_pretrained(tmp_path / "base")
    how = peft.LoraConfig(r=16, target_modules=["query", "value"], init_lora_weights=False)
    model = peft.get_peft_model(base, how).eval()
    model.save_pretrained(tmp_path / "adapter")
    tokens = {"input_ids": torch.randint(5, 96, (4, 12))}
    with torch.no_grad():
        wanted, plain = model(**tokens).last_hidden_state, model.unload()(**tokens).last_hidden_state
    octavo.compress(tmp_path / "adapter", ratio=6, preset="fast").save(tmp_path / "small")
    restored = tmp_path / "restored"
    restored.mkdir()
    save_file(octavo.load(tmp_path / "small"), restored / "adapter_model.safetensors", {"format": "pt"})
    shutil.copyfile(tmp_path / "small" / "adapter_config.json", restored / "adapter_config.json")
    base = transformers.BertModel.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(base, restored).eval()(**tokens).last_hidden_state
    assert (found - wanted).norm() < 0.3 * (plain - wanted).norm()
