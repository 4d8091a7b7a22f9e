"""What goes with the weights into an artifact, and what stays behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

import octavo
from octavo.sources.companions import copy_companions

TOKENIZERS = [
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "spiece.model", "sentencepiece.bpe.model",
    "vocab.txt", "vocab.json", "vocab-src.json", "merges.txt", "bpe.codes", "qwen.tiktoken", "dict.txt", "tekken.json",
    "special_tokens_map.json", "added_tokens.json", "entity_vocab.json", "source.spm", "target.spm", "sp.vocab",
]  # fmt: skip
OTHERS = [
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "chat_template.jinja",
    "additional_chat_templates/tools.jinja", "modules.json", "config_sentence_transformers.json",
    "sentence_bert_config.json", "1_Pooling/config.json", "modeling_mine.py", "code/blocks.py", "LICENSE", "NOTICE",
    "LICENSE.txt", "USE_POLICY.md", "id2label.json",
]  # fmt: skip
LEFT = ["corpus.txt", "train.jsonl", "train.json", "pairs.csv", "deep/notes.txt", "vectors.parquet"]
UNMISSED = [
    ".gitattributes", ".cache/tokenizer.json", "README.md", "plot.png", "pytorch_model.bin", "model.fp16.safetensors",
    "onnx/model.onnx", "onnx/tokenizer.json", "checkpoint-5/model.safetensors", "checkpoint-5/vocab.txt",
    "model.safetensors.index.json", "__pycache__/modeling_mine.cpython-313.pyc", "trainer_state.json",
]  # fmt: skip


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def files(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A source and an artifact, both empty."""
    (tmp_path / "source").mkdir()
    (tmp_path / "artifact").mkdir()
    return tmp_path / "source", tmp_path / "artifact"


def test_what_belongs_to_the_model_is_copied(pair: tuple[Path, Path]) -> None:
    source, artifact = pair
    put(source, *TOKENIZERS, *OTHERS)
    assert copy_companions(source, artifact) == []
    assert files(artifact) == {*TOKENIZERS, *OTHERS}


def test_what_does_not_is_named(pair: tuple[Path, Path]) -> None:
    source, artifact = pair
    put(source, *LEFT, *UNMISSED)
    (source / "large.json").write_text(json.dumps(["a sentence of somebody"] * 100_000))
    (note,) = copy_companions(source, artifact)
    assert files(artifact) == set()
    assert set(note.removeprefix("not copied: ").split(", ")) == {
        f"{name} (not known to belong to the model)" for name in (*LEFT, "large.json")
    }


def test_pickles_are_never_copied(pair: tuple[Path, Path]) -> None:
    source, artifact = pair
    (source / "vectors.model").write_bytes(b"\x80\x04.")
    (source / "vocab.pkl").write_bytes(b"\x80\x04.")
    assert copy_companions(source, artifact) == ["not copied: vectors.model (a pickle)"]
    assert files(artifact) == set()


def test_links_that_leave_the_folder_and_pipes_are_not_followed(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source, artifact = pair
    put(tmp_path, "secret.json", "elsewhere/config.json")
    put(source, "vocab.txt")
    (source / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    (source / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    (source / "added_tokens.json").symlink_to(source / "vocab.txt")
    (source / "tokenizer_config.json").symlink_to(tmp_path / "nowhere")
    os.mkfifo(source / "merges.txt")
    (note,) = copy_companions(source, artifact)
    assert files(artifact) == {"vocab.txt", "added_tokens.json"}
    assert not (artifact / "added_tokens.json").is_symlink()
    for part in (
        "tokenizer.json (a link out of the folder)", "1_Pooling (a link to a folder)", "merges.txt (not a regular file)",
        "tokenizer_config.json (a broken link)",
    ):  # fmt: skip
        assert part in note


def test_links_of_the_hub_s_cache_are_the_source(tmp_path: Path) -> None:
    source, artifact = tmp_path / "models--a--b" / "snapshots" / "5f3c", tmp_path / "artifact"
    put(tmp_path / "models--a--b" / "blobs", "0aff")
    source.mkdir(parents=True)
    (source / "tokenizer.json").symlink_to(Path("..", "..", "blobs", "0aff"))
    artifact.mkdir()
    assert copy_companions(source, artifact) == []
    assert files(artifact) == {"tokenizer.json"}


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin", None])
def test_an_adapter_goes_with_its_weights_or_not_at_all(pair: tuple[Path, Path], weights: str | None) -> None:
    source, artifact = pair
    put(source, "adapter_config.json", *([weights] if weights else []))
    (note,) = copy_companions(source, artifact)
    whole = weights == "adapter_model.safetensors"
    assert files(artifact) == ({"adapter_config.json", weights} if whole else set())
    assert ("copied unchanged, and neither compressed nor counted" if whole else "was not copied") in note


def bert(folder: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    BertModel(config).save_pretrained(folder)
    return folder


def test_an_artifact_with_an_adapter_counts_the_model_alone(tmp_path: Path) -> None:
    source, out = bert(tmp_path / "source"), tmp_path / "out"
    alone = octavo.compress(source, ratio=3, preset="data-free").built.bytes
    put(source, "adapter_config.json", "corpus.txt", "LICENSE")
    save_file({"a": torch.randn(8, 64)}, source / "adapter_model.safetensors")
    report = octavo.compress(source, ratio=3, preset="data-free").save(out)
    # The manifest holds the checksum of the adapter's configuration.
    assert abs(report["artifact"]["bytes"] - alone) < 100
    assert {"adapter_config.json", "adapter_model.safetensors", "LICENSE"} <= files(out)
    notes = "\n".join(report["calibration"]["warnings"])
    assert "not copied: corpus.txt" in notes and "the adapter in the model's folder is copied" in notes
    assert octavo.verify(out).weights_match


CODE = """
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
open({mark!r}, "a").close()

class MineConfig(PreTrainedConfig):
    model_type = "mine"

class Mine(PreTrainedModel):
    config_class = MineConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = nn.Linear(48, 64)
        self.post_init()

    def forward(self, x):
        return self.layer(x)
"""
LOAD = """
import sys, torch, octavo
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, local_files_only=True)
state = octavo.load(sys.argv[1])
assert type(model).__name__ == "Mine"
assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
"""


@pytest.mark.parametrize("preset", ["data-free", "fast"])
def test_custom_code_is_copied_and_not_run(tmp_path: Path, preset: str) -> None:
    source, out, mark = tmp_path / "source", tmp_path / "out", tmp_path / "mark"
    put(source, "README.md")
    (source / "modeling_mine.py").write_text(CODE.format(mark=str(mark)))
    classes = {"AutoConfig": "modeling_mine.MineConfig", "AutoModel": "modeling_mine.Mine"}
    (source / "config.json").write_text(
        json.dumps({"model_type": "mine", "architectures": ["Mine"], "auto_map": classes})
    )
    torch.manual_seed(0)
    save_file(
        {"layer.weight": torch.randn(64, 48), "layer.bias": torch.randn(64)},
        source / "model.safetensors",
        {"format": "pt"},
    )
    octavo.compress(source, ratio=2, preset=preset).save(out)
    assert octavo.verify(out).weights_match and not mark.exists()
    assert (out / "modeling_mine.py").read_bytes() == (source / "modeling_mine.py").read_bytes()
    assert json.loads((out / "config.json").read_text())["auto_map"] == classes
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", LOAD, str(out)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert mark.exists()
