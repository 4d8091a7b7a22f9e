"""Which files of a folder count: those that ``from_pretrained`` loads; the others are named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import octavo
from octavo.sources.files import from_path
from octavo.sources.source import Source


def write(folder: Path, **options: object) -> dict[str, torch.Tensor]:
    """A language model as ``save_pretrained`` leaves it; returns its stored tensors."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=2, n_positions=32)).save_pretrained(
        folder, **options
    )
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}


def opened(folder: Path) -> Source:
    return from_path(folder, module=False)


def put(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    file.parent.mkdir(exist_ok=True)
    save_file(tensors, file)


BESIDE = [
    "consolidated.safetensors", "model.fp16.safetensors", "adapter_model.safetensors", "original/weights.safetensors",
    "model-00001-of-00002.safetensors", "pytorch_model.bin", "onnx/model.onnx", "tf_model.h5", "old.pth",
]  # fmt: skip


@pytest.mark.parametrize("other", BESIDE)
def test_what_stands_beside_is_named_and_not_counted(tmp_path: Path, other: str) -> None:
    tensors = write(tmp_path)
    if other.endswith(".safetensors"):
        put(tmp_path / other, {"orig." + name: tensor + 1 for name, tensor in tensors.items()})
    else:
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_bytes(b"\x80weights")
    source = opened(tmp_path)
    assert source.notes == [f"not counted and not read: {other}"]
    assert source.original_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert set(source.shapes) == set(tensors)


def test_an_index_beside_the_whole_is_old(tmp_path: Path) -> None:
    tensors = write(tmp_path)
    put(tmp_path / "model-00001-of-00002.safetensors", {"old": torch.zeros(40, 40)})
    index = {"weight_map": {"old": "model-00001-of-00002.safetensors", "older": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    source = opened(tmp_path)
    assert set(source.shapes) == set(tensors)
    assert source.notes == ["not counted and not read: model-00001-of-00002.safetensors, model.safetensors.index.json"]


def test_an_index_that_is_read_is_not_beside(tmp_path: Path) -> None:
    write(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert opened(tmp_path).notes == []


def test_the_report_names_them_and_the_artifact_loads(tmp_path: Path) -> None:
    folder = tmp_path / "two"
    tensors = write(folder)
    put(folder / "consolidated.safetensors", {"orig." + name: tensor for name, tensor in tensors.items()})
    report = octavo.compress(folder, ratio=3, preset="data-free").save(tmp_path / "out", report=False)
    assert "not counted and not read: consolidated.safetensors" in report["calibration"]["warnings"]
    assert report["source"]["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    _, info = GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize("preset", ["data-free", "fast", "default"])
@pytest.mark.parametrize("number", [0, 1, -1])
def test_a_missing_shard_is_named(tmp_path: Path, preset: str, number: int) -> None:
    write(tmp_path, max_shard_size="50KB")
    (tmp_path / "model.safetensors.index.json").unlink()
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    shards[number].unlink()
    with pytest.raises(octavo.RequestError, match=f"shard {shards[number].name} is missing"):
        octavo.compress(tmp_path, ratio=3, preset=preset)


def test_a_missing_shard_of_bare_tensors_is_named(tmp_path: Path) -> None:
    put(tmp_path / "net-00002-of-00002.safetensors", {"a": torch.zeros(40, 40)})
    with pytest.raises(octavo.RequestError, match=r"shard net-00001-of-00002\.safetensors is missing"):
        octavo.compress(tmp_path, ratio=3)


def test_whole_shards_need_no_index(tmp_path: Path) -> None:
    tensors = write(tmp_path / "model", max_shard_size="50KB")
    (tmp_path / "model" / "model.safetensors.index.json").unlink()
    done = octavo.compress(tmp_path / "model", ratio=3, preset="fast")
    assert set(done.opened.source.shapes) == set(tensors)
    assert any("from_pretrained does not find model-00001-of-" in note for note in done.opened.notes)
    done.save(tmp_path / "out", report=False)
    _, info = GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_shards_of_two_models_are_refused(tmp_path: Path) -> None:
    for name in ("model-1-of-1", "model-1-of-2", "model-2-of-2"):
        put(tmp_path / f"{name}.safetensors", {name: torch.zeros(40, 40)})
    with pytest.raises(octavo.RequestError, match="shards of two models"):
        opened(tmp_path)


def test_bare_files_of_one_folder_are_one_source(tmp_path: Path) -> None:
    put(tmp_path / "a.safetensors", {"a": torch.zeros(40, 40)})
    put(tmp_path / "b.safetensors", {"b": torch.ones(40, 40)})
    assert set(opened(tmp_path).shapes) == {"a", "b"}
    put(tmp_path / "c.safetensors", {"b": torch.zeros(40, 40)})
    with pytest.raises(octavo.RequestError, match=r"tensor 'b' is in b\.safetensors and in c\.safetensors"):
        opened(tmp_path)


def test_indexed_shards_that_hold_one_tensor_twice_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "one.safetensors", {"a": torch.zeros(40, 40)})
    put(tmp_path / "two.safetensors", {"a": torch.ones(40, 40), "b": torch.ones(40, 40)})
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(octavo.RequestError, match="tensor 'a' is in"):
        opened(tmp_path)


def test_a_model_under_another_name(tmp_path: Path) -> None:
    tensors = write(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    assert set(opened(tmp_path).shapes) == set(tensors)
    put(tmp_path / "other.safetensors", {"a": torch.zeros(40, 40)})
    with pytest.raises(octavo.RequestError, match=r"several possible weight files \(other\..*weights\."):
        opened(tmp_path)
    (tmp_path / "other.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(octavo.RequestError, match=r"from_pretrained loads pytorch_model\.bin here"):
        opened(tmp_path)


def test_the_config_names_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "named"
    tensors = write(folder)
    put(folder / "other.safetensors", {name: tensor + 1 for name, tensor in tensors.items()})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    assert torch.equal(opened(folder).read("transformer.wte.weight"), tensors["transformer.wte.weight"] + 1)
    octavo.compress(folder, ratio=3, preset="data-free").save(tmp_path / "out", report=False)
    _, info = GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    put(tmp_path / "adapter_model.safetensors", {"a": torch.zeros(40, 40)})
    with pytest.raises(octavo.RequestError, match="merge_and_unload"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["net.pth", "net.PT", "pytorch_model.bin", "last.ckpt"])
def test_a_pickle_says_how_to_load_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80")
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(octavo.RequestError) as found:
            opened(source)
        for part in (name, "weights_only=True", "load_state_dict", "octavo.compress(model"):
            assert part in str(found.value)


def test_a_folder_by_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mine" / "deep"
    write(folder)
    monkeypatch.chdir(folder)
    source = opened(Path("."))
    assert source.title == "deep"
    monkeypatch.chdir(tmp_path)
    assert source.read("transformer.wte.weight").shape == (100, 32), "the working folder has changed since"
    monkeypatch.chdir(folder)
    (folder / "below").mkdir()
    monkeypatch.chdir(folder / "below")
    assert opened(Path("..")).title == "deep"
    report = octavo.compress("..", ratio=3, preset="data-free").save(tmp_path / "out", report=False)
    assert report["title"] == report["source"]["path"] == "deep"
