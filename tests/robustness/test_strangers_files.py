"""What lies beside the weights leads no loader elsewhere: no code, no other weights, no file without end."""

import json
import os
import pickle
import shutil
import socket
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import octavo
from octavo.artifact import writing
from octavo.errors import ArtifactError, OctavoError
from octavo.system.notes import OctavoWarning


@pytest.fixture
def copy(artifact, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(artifact, folder)
    return folder


@pytest.fixture(scope="module")
def shards(bert, texts, tmp_path_factory):
    """An artifact in several files, which are told apart by an index."""
    before, writing.SHARD_BYTES = writing.SHARD_BYTES, 3000
    try:
        out = tmp_path_factory.mktemp("artifact") / "shards"
        octavo.compress(bert, ratio=3, data=texts, preset="fast", methods=["rtn", "keep"]).save(out)
    finally:
        writing.SHARD_BYTES = before
    assert (out / "model.safetensors.index.json").exists()
    return out


def configured(folder, **entries):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def refused(folder, match=None):
    """By loading and by verifying, with one error of our own."""
    for read in (octavo.load, octavo.verify):
        with warnings.catch_warnings(), pytest.raises(ArtifactError, match=match if read is octavo.load else None):
            warnings.simplefilter("ignore", OctavoWarning)
            read(folder)


def test_a_sound_artifact_loads_without_a_word(copy):
    with warnings.catch_warnings():
        warnings.simplefilter("error", OctavoWarning)
        octavo.load(copy)
        assert octavo.verify(copy).outputs_match


def test_a_changed_configuration_is_told_by_name(copy):
    configured(copy, layer_norm_eps=0.5)
    with pytest.warns(OctavoWarning, match=r"config\.json was changed"):
        octavo.load(copy)
    with pytest.raises(ArtifactError, match=r"config\.json was changed"):
        octavo.verify(copy)


@pytest.mark.parametrize("name", ["generation_config.json", "modules.json", "1_Pooling/config.json"])
def test_an_added_configuration_is_told_by_name(name, copy):
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("[]" if name == "modules.json" else "{}")
    with pytest.raises(ArtifactError, match=f"{name} was added"):
        octavo.verify(copy)


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
        ({"quantization_config": None}, "quantization_config"),
        ({"quantization_config": ["octavo"]}, "quantization_config"),
        ({"quantization_config": {"quant_method": "octavo", "packed": "yes"}}, "packed"),
        ({"quantization_config": {"quant_method": "octavo", "packed": True}}, "packed=True"),
        ({"attn_implementation": "stranger/kernel"}, "kernel"),
        ({"_attn_implementation": "stranger/kernel:forward"}, "kernel"),
        ({"attn_implementation": {"": "stranger/kernel"}}, "kernel"),
        ({"text_config": {"attn_implementation": "stranger/kernel"}}, "kernel"),
        ({"architectures": "BertModel"}, "architectures"),
        ({"architectures": [7]}, "architectures"),
        ({"dtype": 7}, "dtype"),
        ({"dtype": "float7"}, "dtype"),
        ({"torch_dtype": "system"}, "dtype"),
        ({"model_type": 3}, "model_type"),
        ({"num_labels": 10**9}, "num_labels"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_hidden_layers": 10_000}, "tensors can fill at most"),
        ({"num_hidden_layers": 3}, "does not fill"),
        ({"vocab_size": 10**9}, ""),
        ({"max_position_embeddings": 10**10}, ""),
        ({"hidden_size": "32"}, ""),
        ({"hidden_act": "__import__"}, ""),
        ({"num_attention_heads": 0}, ""),
        ({"add_cross_attention": True, "is_decoder": True}, "does not fill"),
    ],
    ids=str,
)  # fmt: skip
def test_a_configuration_is_refused(entries, match, copy):
    started = time.monotonic()
    configured(copy, **entries)
    refused(copy, match)
    assert time.monotonic() - started < 30


def test_code_beside_the_weights_is_never_run(copy, tmp_path):
    (copy / "modeling_gift.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Gift: pass\n")
    configured(copy, auto_map={"AutoModel": "modeling_gift.Gift", "AutoConfig": "modeling_gift.Gift"})
    with pytest.warns(OctavoWarning, match=r"config\.json was changed"):
        octavo.load(copy)
    assert not (tmp_path / "ran").exists()


class Bomb:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


def test_a_pickle_beside_the_weights_is_never_read(shards, tmp_path):
    """Not even where the manifest names one shard and no index, so that loaders would look for another file."""
    folder = tmp_path / "copy"
    shutil.copytree(shards, folder)
    for name in ("pytorch_model.bin", "1.pt", "tokenizer.pkl"):
        (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    octavo.load(folder)
    (folder / "model.safetensors.index.json").unlink()
    refused(folder)
    assert not (tmp_path / "ran").exists()


def test_the_loader_of_transformers_takes_no_other_weights(artifact, shards, tmp_path):
    """Not those of a file that it prefers, nor of an index that leaves a shard out or leads elsewhere."""
    import transformers

    other = {name: torch.randn(4) for name in ("a", "b")}
    preferred = tmp_path / "preferred"
    shutil.copytree(shards, preferred)
    save_file(other, preferred / "model.safetensors", {"format": "pt"})
    left_out, elsewhere = tmp_path / "left-out", tmp_path / "elsewhere"
    for folder in (left_out, elsewhere):
        shutil.copytree(shards, folder)
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    fewer = {name: file for name, file in index["weight_map"].items() if file != names[-1]}
    (left_out / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": fewer}))
    shutil.copyfile(shards / names[0], tmp_path / "outside.safetensors")
    moved = {name: "../outside.safetensors" if file == names[0] else file for name, file in index["weight_map"].items()}
    (elsewhere / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": moved}))
    for folder in (preferred, left_out, elsewhere):
        refused(folder)
        with pytest.raises(OctavoError):
            transformers.AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("within", [False, True], ids=["folder", "subfolder"])
@pytest.mark.parametrize("loader", ["AutoConfig", "AutoModel", "BertConfig", "BertModel"])
def test_a_configuration_that_names_other_weights_is_noticed_by_the_loader_itself(loader, within, copy):
    """A user of ``from_pretrained`` never calls our own check."""
    import transformers

    stored = load_file(copy / "model.safetensors")
    save_file(stored, copy / "other.safetensors", {"format": "pt"})
    configured(copy, transformers_weights="other.safetensors")
    named = (copy.parent, {"subfolder": copy.name}) if within else (copy, {})
    with pytest.raises(ArtifactError, match="other weights"):
        getattr(transformers, loader).from_pretrained(named[0], **named[1])


@pytest.mark.parametrize(
    "name", ["config.json", "report.json", "tokenizer.json", "modules.json", "1_Pooling/config.json"]
)
@pytest.mark.parametrize("kind", ["fifo", "device", "socket", "link", "loop", "outside"])
def test_companions_are_ordinary_files(name, kind, copy, tmp_path):
    file = copy / name
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as opened:
            here = Path.cwd()
            os.chdir(file.parent)
            try:
                opened.bind(file.name)
            finally:
                os.chdir(here)
    elif kind == "outside":
        (tmp_path / "outside.json").write_text("{}")
        file.symlink_to(tmp_path / "outside.json")
    else:
        file.symlink_to({"device": "/dev/zero", "link": "/nothing/there", "loop": file}[kind])
    started = time.monotonic()
    refused(copy, name)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{}" * 10_000_000, "[1]", '{"a": NaN}', '{"a": 1, "a": 2}', "\0"], ids=len
)
def test_a_configuration_is_a_small_object(text, copy):
    (copy / "config.json").write_text(text)
    refused(copy)


def test_a_folder_in_the_cache_of_the_hub_is_one_of_links(artifact, tmp_path):
    """There every file is a link to a blob."""
    root = tmp_path / "models--someone--model"
    snapshot, blobs = root / "snapshots" / "0123", root / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for k, file in enumerate(sorted(file for file in artifact.iterdir() if file.is_file())):
        shutil.copyfile(file, blobs / str(k))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(k)))
    assert octavo.verify(snapshot).outputs_match


def test_an_adapter_that_was_not_written_with_it_is_refused(copy):
    (copy / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "/somewhere/else", "peft_type": "LORA"})
    )
    refused(copy, "adapter_config")


def test_modules_of_an_encoder_are_those_of_its_library(copy):
    pytest.importorskip("sentence_transformers")
    from octavo.sources.encoders import load_encoder

    (copy / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "antigravity.Gift"}]))
    with pytest.raises(ArtifactError, match=r"antigravity\.Gift"):
        load_encoder(copy)
    (copy / "config_sentence_transformers.json").write_text('{"model_type": "losses"}')
    with pytest.raises(OctavoError, match="losses"):
        load_encoder(copy)


@pytest.mark.parametrize(
    "entries",
    [
        {"num_labels": 10**9},
        {"num_hidden_layers": 20_000},
        {"attn_implementation": "stranger/kernel"},
        {"vocab_size": 10**9},
    ],
    ids=str,
)
def test_users_of_from_pretrained_are_guarded_too(entries, copy):
    import transformers

    configured(copy, **entries)
    started = time.monotonic()
    with warnings.catch_warnings(), pytest.raises(OctavoError):
        warnings.simplefilter("ignore", OctavoWarning)
        transformers.AutoModel.from_pretrained(copy)
    assert time.monotonic() - started < 10


def test_users_of_from_pretrained_are_told_of_changes(copy):
    import transformers

    configured(copy, layer_norm_eps=0.5)
    with pytest.warns(OctavoWarning, match=r"config\.json was changed"):
        transformers.AutoModel.from_pretrained(copy)
    with pytest.warns(OctavoWarning, match="random values"):
        configured(copy, num_hidden_layers=3)
        transformers.AutoModel.from_pretrained(copy)


@pytest.mark.parametrize("kind", ["device", "class", "many"])
def test_users_of_sentence_transformers_are_guarded_too(kind, copy):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    file = copy / "modules.json"
    if kind == "device":
        file.symlink_to("/dev/zero")
    else:
        name = "antigravity.Gift" if kind == "class" else "sentence_transformers.models.Transformer"
        one = {"idx": 0, "name": "0", "path": "", "type": name}
        file.write_text(json.dumps([one] * (100 if kind == "many" else 1)))
    with warnings.catch_warnings(), pytest.raises(ArtifactError):
        warnings.simplefilter("ignore", OctavoWarning)
        sentence_transformers.SentenceTransformer(str(copy))
