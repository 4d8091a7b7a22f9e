"""Saving: an artifact appears whole or not at all, as it was measured, with its card and its report."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

import octavo


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saving")
    generator = torch.Generator().manual_seed(0)
    tensors = {"one": torch.randn(64, 48, generator=generator), "two": torch.randn(96, 64, generator=generator)}
    save_file({**tensors, "bias": torch.zeros(96)}, folder / "bare.safetensors")
    return octavo.compress(folder / "bare.safetensors", ratio=4, preset="fast", methods=["entropy", "keep"])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_bytes_on_disk_are_those_that_were_chosen(done, tmp_path):
    done.save(tmp_path / "out")
    files = contents(tmp_path / "out")
    assert set(files) == {"model.safetensors", "octavo.json", "README.md", "report.html", "report.json"}
    size = len(files["model.safetensors"]) + len(files["octavo.json"])
    assert size == done.built.bytes <= done.budget.bytes
    report = json.loads(files["report.json"])
    assert report["artifact"]["bytes"] == size and report["artifact"]["ratio"] >= 4
    assert report["timings"]["total"] >= report["timings"]["verify"] >= 0
    assert b"# bare, compressed" in files["README.md"]
    # What can be read by its owner alone is of no use to the others on a server.
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


def test_it_is_saved_as_often_as_wanted_and_is_the_same(done, tmp_path):
    for name in ("one", "other"):
        done.save(tmp_path / name, report=False)
    one, other = contents(tmp_path / "one"), contents(tmp_path / "other")
    assert set(one) == {"model.safetensors", "octavo.json", "README.md"}
    assert all(one[name] == other[name] for name in ("model.safetensors", "octavo.json"))


def test_a_folder_in_use_is_replaced_only_if_that_is_said(done, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(octavo.RequestError, match="the folder is not empty"):
        done.save(tmp_path / "out")
    assert contents(tmp_path / "out") == {"notes.txt": b"mine"}
    (tmp_path / "out" / "octavo.json").write_text("{}")
    done.save(tmp_path / "out", overwrite=True, report=False)
    assert set(contents(tmp_path / "out")) == {"model.safetensors", "octavo.json", "README.md"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_source_is_never_replaced(tmp_path):
    (tmp_path / "models").mkdir()
    save_file({"one": torch.randn(64, 48)}, tmp_path / "models" / "bare.safetensors")
    done = octavo.compress(tmp_path / "models" / "bare.safetensors", ratio=2, preset="fast", methods=["rtn", "keep"])
    with pytest.raises(octavo.RequestError, match="holds the source, which would be replaced"):
        done.save(tmp_path / "models", overwrite=True)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["bare.safetensors"]


def test_a_source_that_changed_since_is_named_and_nothing_is_left(tmp_path):
    source = tmp_path / "bare.safetensors"
    save_file({"one": torch.randn(64, 48)}, source)
    done = octavo.compress(source, ratio=2, preset="fast", methods=["rtn", "keep"])
    save_file({"one": torch.randn(64, 48)}, source)
    os.utime(source, ns=(0, 0))
    with pytest.raises(octavo.OctavoError, match=r"bare\.safetensors"):
        done.save(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bare.safetensors"]
