"""Sources and data that cannot be read: the file, the tensor or the line is named, and nothing is left behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import octavo

#: Fixtures of conftest.py: a command run in this process, and one that must be refused.
Command = Refused = Callable[..., Any]


def test_a_missing_path(refused: Refused, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "--ratio", "4", says="nowhere: no such file or folder")


def test_a_text_file(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "model.txt").write_text("weights")
    refused(tmp_path / "model.txt", "--ratio", "4", says="give a .safetensors file, its .index.json or a .gguf file")
    (tmp_path / "model.safetensors").write_text("weights, or so this file says" * 9)
    refused(tmp_path / "model.safetensors", "--ratio", "4", says="cannot be read as safetensors")


@pytest.mark.parametrize("length", [0, 5, 8, 60, 300, -1, -5000])
def test_a_truncated_file(refused: Refused, bare: Path, tmp_path: Path, length: int) -> None:
    file = tmp_path / "cut.safetensors"
    file.write_bytes(bare.read_bytes()[:length])
    refused(file, "--ratio", "4", says="cut.safetensors: cannot be read as safetensors, it may be truncated")


def test_a_truncated_model_folder(refused: Refused, bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "bert")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    refused(folder, "--ratio", "4", says="model.safetensors: cannot be read as safetensors")


def test_a_missing_shard(refused: Refused, lab: Any, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    folder.mkdir()
    lab.write_bare(folder / "model-00001-of-00002.safetensors")
    names = {"first.weight": "model-00001-of-00002.safetensors", "third.weight": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    for source in (folder, folder / "model.safetensors.index.json"):
        refused(source, "--ratio", "4", says="names the shard model-00002-of-00002.safetensors, which is missing")


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b"\xff", b'{"weight_map": []}', b'{"weight_map": {"a": 5}}', b'{"weight_map": {"a": ["b"]}}'],
)
def test_a_damaged_index(refused: Refused, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    refused(tmp_path / "model.safetensors.index.json", "--ratio", "4", says="not an index of safetensors shards")


def test_shards_are_one_source(lab: Any, tmp_path: Path) -> None:
    lab.write_bare(tmp_path / "a.safetensors")
    save_file({"third.weight": torch.randn(64, 64)}, tmp_path / "b.safetensors")
    index = {"weight_map": {"first.weight": "a.safetensors", "third.weight": "b.safetensors"}}
    (tmp_path / "x.safetensors.index.json").write_text(json.dumps(index))
    done = octavo.compress(tmp_path / "x.safetensors.index.json", ratio=4, preset="fast")
    assert {"first.weight", "third.weight", "steps"} <= set(done.opened.source.shapes)


@pytest.mark.parametrize("content", [None, "not JSON", "[]", '{"model_type": "llama", "hidden_size": "x"}'])
def test_a_damaged_config(refused: Refused, bert: Path, tmp_path: Path, content: str | None) -> None:
    folder = shutil.copytree(bert, tmp_path / "bert")
    (folder / "config.json").write_text(content or "")
    refused(folder, "--ratio", "3", says=str(folder))


def test_an_artifact_is_no_source(refused: Refused, artifact: Path) -> None:
    refused(artifact, "--ratio", "3", says="already compressed; give the original folder instead")


def test_a_folder_without_weights(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "--ratio", "4", says="holds no .safetensors file")


def test_a_file_without_tensors(refused: Refused, tmp_path: Path) -> None:
    save_file({}, tmp_path / "none.safetensors")
    refused(tmp_path / "none.safetensors", "--ratio", "4", says="holds no tensors")


def test_a_dtype_that_is_no_float_of_a_model_survives(lab: Any, tmp_path: Path) -> None:
    odd = torch.randn(4, 4).to(torch.float8_e4m3fn)
    file = lab.write_bare(tmp_path / "x.safetensors", odd=odd)
    octavo.compress(file, ratio=3, preset="data-free").save(tmp_path / "out", report=False)
    found = octavo.load(tmp_path / "out")["odd"]
    assert found.dtype == odd.dtype and torch.equal(found.view(torch.uint8), odd.view(torch.uint8))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite(refused: Refused, lab: Any, tmp_path: Path, value: float) -> None:
    weight = torch.randn(40, 30)
    weight[7, 11] = value
    file = lab.write_bare(tmp_path / "x.safetensors", third=weight)
    refused(file, "--ratio", "4", says=f"tensor 'third' holds {value} at (7, 11)")
    module = lab.net()
    with torch.no_grad():
        module.norm.bias[3] = value
    with pytest.raises(octavo.RequestError, match=r"tensor 'norm.bias' holds .* at \(3,\)"):
        octavo.compress(module, ratio=2)


def test_odd_tensors_survive(lab: Any, tmp_path: Path) -> None:
    odd = {
        "empty": torch.zeros(0),
        "hollow": torch.zeros(3, 0),
        "none": torch.zeros(0, dtype=torch.int32),
        "scalar": torch.tensor(3.5),
        "flag": torch.tensor(True),
        "wide": torch.randn(2, 400, dtype=torch.float64),
        "zeros": torch.zeros(40, 30),
        "same": torch.full((40, 30), 0.25, dtype=torch.bfloat16),
    }
    file = lab.write_bare(tmp_path / "x.safetensors", **odd)
    octavo.compress(file, ratio=3, preset="fast").save(tmp_path / "out", report=False)
    state = octavo.load(tmp_path / "out")
    for name, tensor in odd.items():
        assert state[name].shape == tensor.shape and state[name].dtype == tensor.dtype, name
    for name in ("empty", "hollow", "none", "scalar", "flag", "zeros"):
        assert torch.equal(state[name], odd[name]), name


def test_a_source_with_nothing_to_compress(refused: Refused, bare: Path, tmp_path: Path) -> None:
    save_file({"bias": torch.randn(5000), "steps": torch.arange(7)}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "--ratio", "1.5", says="there is nothing to compress")
    refused(bare, "--ratio", "1.5", "--ignore", "*", says="there is nothing to compress")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.txt", b"", "0 calibration texts; at least 10 are needed"),
        ("t.txt", b"\n \n\n", "0 calibration texts; at least 10 are needed"),
        ("t.txt", b"one line only\n", "1 calibration texts; at least 10 are needed"),
        ("t.txt", b"a line\n" * 8, "8 calibration texts; at least 10 are needed"),
        ("t.txt", "zażółć\n".encode("utf-16"), "cannot be read as UTF-8 text"),
        ("t.jsonl", b'{"text": "fine"}\n' * 4 + b'{"text": \n' + b'{"text": "fine"}\n' * 9, "line 5 is not JSON"),
        ("t.jsonl", b'{"text": "fine"}\n' * 9 + b'{"words": "no"}\n', "line 10 has no string under 'text'"),
        ("t.jsonl", b'{"text": "fine"}\n\n' + b'{"text": 5}\n' * 9, "line 3 has no string under 'text'"),
    ],
)
def test_texts(refused: Refused, bert: Path, tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    refused(bert, "--ratio", "3", "--preset", "fast", "--data", tmp_path / name, says=says)


def test_texts_that_are_no_file(refused: Refused, bert: Path, tmp_path: Path) -> None:
    refused(bert, "--ratio", "3", "--data", tmp_path / "missing.txt", says="calibration data cannot be read")
    refused(bert, "--ratio", "3", "--data", bert, says="takes neither images nor sounds; give a file of texts")


def test_data_for_a_bare_file(refused: Refused, bare: Path, texts: Path) -> None:
    refused(bare, "--ratio", "3", "--data", texts, says="so calibration data cannot be used")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "no examples in 0 batches"),
        (iter(()), "no examples in 0 batches"),
        ([5, 6], "no examples in 2 batches"),
        ([torch.zeros(3, 3, 8, 8), torch.zeros(4, 3, 8, 8)], "give 10 or more"),
        ([torch.zeros(1, 3, 8, 8)] * 9, "give 10 or more"),
        (5, "give a file or list of texts, or an iterable of batches"),
        (["some text"] * 20, "texts need a transformers folder with a tokenizer"),
        ("texts.txt", "texts need a transformers folder with a tokenizer"),
    ],
)
def test_data_for_a_module(lab: Any, data: Any, says: str) -> None:
    with pytest.raises(octavo.RequestError, match=says):
        octavo.compress(lab.net(), ratio=2, data=data)


@pytest.mark.parametrize("size", [1, 3, 16])
def test_batches_of_any_size_are_divided(lab: Any, tmp_path: Path, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = list(torch.randn(16, 3, 8, 8, generator=generator).split(size))
    done = octavo.compress(lab.net(), ratio=2, data=batches, preset="fast")
    assert sum(map(len, done.opened.held_data)) == 4 and sum(map(len, done.opened.calibration_data)) == 12
    result = done.save(tmp_path / "out", report=False)
    assert result["quality"]["data"].startswith("4 held-out examples")


def test_outputs_that_are_not_finite(lab: Any) -> None:
    with pytest.raises(octavo.RequestError, match="gives NaN or Inf on a batch"):
        octavo.compress(lab.net(), ratio=2, data=[torch.full((16, 3, 8, 8), float("inf"))], preset="fast")
