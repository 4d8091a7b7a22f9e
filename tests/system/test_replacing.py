"""What outputs replace: regular files and Octavo's own folders, and only if that was asked for."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import octavo
from octavo.cli import app
from octavo.runtimes.onnx.exporting import export
from octavo.system.atomic import write_file


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("a device can be made by root only, and not everywhere")


def link(path: Path) -> None:
    (path.parent / "target").write_text("mine")
    path.symlink_to(path.parent / "target")


def bound(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(path))


SPECIAL = {"a FIFO": fifo, "a device": device, "a symbolic link": link, "a socket": bound}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("source") / "bare.safetensors"
    save_file({"one": torch.randn(64, 48, generator=torch.Generator().manual_seed(0))}, file)
    return file


@pytest.fixture(scope="module")
def measured(bare: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profile") / "measured"
    octavo.profile(bare, folder, preset="fast")
    return folder


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


def identity(place: Path) -> tuple[int, ...]:
    """What a write would change; looking at a link changes when it was read."""
    found = os.lstat(place)
    return found.st_mode, found.st_ino, found.st_size, found.st_mtime_ns


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_is_refused_by_every_command(
    bare: Path, measured: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The name of a socket is short.
    monkeypatch.chdir(tmp_path)
    place = Path("x.yaml")
    SPECIAL[kind](place)
    place = tmp_path / place
    before = identity(place)
    for words in (
        ("plan", measured, "--ratio", "4", "--out", place, "--overwrite"),
        ("export", bare, place, "--overwrite"),
        ("compress", bare, "--ratio", "4", "--out", place, "--overwrite"),
        ("profile", bare, "--out", place, "--overwrite"),
        ("frontier", bare, "--ratios", "4", "--out", place),
    ):
        if kind == "a symbolic link" and words[0] not in ("plan", "export"):
            continue
        code, said = run(*words)
        assert code == 2 and kind in said and "x.yaml" in said, (words[0], said)
    assert identity(place) == before


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_is_refused_by_every_writer(
    bare: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    SPECIAL[kind](Path("x"))
    done = octavo.compress(bare, ratio=4, preset="fast")
    writers: tuple[Callable[[], object], ...] = (
        lambda: write_file(tmp_path / "x", b"new"),
        *(() if kind == "a symbolic link" else (lambda: done.save(tmp_path / "x", overwrite=True, report=False),)),
    )
    for writer in writers:
        with pytest.raises(octavo.RequestError, match=kind):
            writer()


def test_a_plan_that_may_have_been_edited_is_replaced_only_if_asked(measured: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("mine")
    words = ("plan", measured, "--ratio", "4", "--out", file)
    code, said = run(*words)
    assert code == 2 and "already exists" in said and "--overwrite" in said
    with pytest.raises(octavo.RequestError, match="already exists"):
        octavo.plan(measured, ratio=4).save(file)
    assert file.read_text() == "mine"
    assert run(*words, "--overwrite")[0] == 0 and "octavo_plan" in file.read_text()


def test_nothing_is_exported_into_what_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    for place in (folder / "model.safetensors", folder / "new.onnx", folder / ".." / "copy" / "model.safetensors"):
        with pytest.raises(octavo.RequestError, match="is part of the source"):
            export(folder, place, overwrite=True)
    with pytest.raises(octavo.RequestError, match="is part of the source"):
        export(folder / "model.safetensors", folder / "model.safetensors", overwrite=True)
    assert (folder / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize("content", [{"notes.txt": "mine"}, {"deep/notes.txt": "mine"}, {".hidden": "mine"}])
def test_a_folder_of_other_files_is_never_replaced(bare: Path, tmp_path: Path, content: dict[str, str]) -> None:
    out = tmp_path / "out"
    for name, text in content.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    for command in (("compress", "--ratio", "4"), ("profile",)):
        code, said = run(command[0], bare, *command[1:], "--out", out, "--overwrite")
        assert code == 2 and "holds files that Octavo did not write" in said
    assert {name: (out / name).read_text() for name in content} == content


def net(width: int = 64) -> nn.Sequential:
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(64, 48), nn.BatchNorm1d(48), nn.Linear(48, width)).eval()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifact") / "folded"
    octavo.compress(net(), ratio=2, preset="fast").save(out)
    return out


@pytest.mark.parametrize("other", [net(65), nn.Sequential(nn.Linear(64, 48)), net()[:2]])
def test_a_refused_load_leaves_the_module_as_it_was(artifact: Path, other: nn.Module) -> None:
    before = {name: (tensor, tensor.clone()) for name, tensor in other.state_dict(keep_vars=True).items()}
    for options in ({}, {"packed": True}, {"factors": True}):
        with pytest.raises(octavo.ArtifactError, match="does not fit"):
            octavo.load(artifact, into=other, **options)
        after = other.state_dict(keep_vars=True)
        assert list(after) == list(before)
        for name, (tensor, values) in before.items():
            assert after[name] is tensor and torch.equal(tensor, values)


def test_a_module_stays_packed_when_a_load_is_refused(artifact: Path) -> None:
    module = net()
    octavo.load(artifact, into=module, packed=True)
    weight = module[0].weight
    module.append(nn.Linear(4, 4))
    with pytest.raises(octavo.ArtifactError, match="does not fit"):
        octavo.load(artifact, into=module)
    assert module[0].weight is weight


def test_a_module_without_memory_is_given_some(artifact: Path) -> None:
    with torch.device("meta"):
        empty = net()
    empty[0].weight = empty[0].weight  # stays one parameter
    octavo.load(artifact, into=empty)
    full = octavo.load(artifact, into=net())
    assert all(torch.equal(empty.state_dict()[name], tensor) for name, tensor in full.state_dict().items())


def test_a_buffer_that_nothing_fills_is_refused(artifact: Path) -> None:
    with torch.device("meta"):
        empty = net()
        empty[0].register_buffer("table", torch.zeros(3), persistent=False)
    with pytest.raises(octavo.ArtifactError, match=r"buffer '0\.table' is on the meta device"):
        octavo.load(artifact, into=empty)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
