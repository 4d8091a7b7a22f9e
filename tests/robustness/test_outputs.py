"""Outputs appear whole or not at all, and nothing of anybody's is harmed on the way."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import octavo

#: Fixtures of conftest.py: a command run in this process, and one that must be refused.
Command = Refused = Callable[..., Any]
FAST = ("--preset", "fast")


def test_a_folder_in_use_is_left_alone(refused: Refused, bare: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refused(bare, "--ratio", "4", says="the folder is not empty; choose another, or give --overwrite to replace it")


def test_an_empty_folder_is_used(command: Command, bare: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert command("compress", bare, *FAST, "--ratio", "4", "--out", tmp_path / "out").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_overwrite_replaces_all_of_it(command: Command, bare: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "deep").mkdir(parents=True)
    (out / "deep" / "notes.txt").write_text("old")
    (out / "octavo.json").write_text("{}")
    result = command("compress", bare, *FAST, "--ratio", "4", "--out", out, "--overwrite", "--json")
    assert result.code == 0 and json.loads(result.out)["artifact"]["ratio"] >= 4
    assert not (out / "deep").exists() and set(octavo.load(out)) >= {"first.weight", "steps"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert out.stat().st_mode & 0o777 == 0o755


def test_overwrite_of_a_failure_leaves_the_old(refused: Refused, bare: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "octavo.json").write_text("mine")
    refused(bare, *FAST, "--ratio", "1e6", "--overwrite", code=3)
    refused(bare, "--ratio", "4", "--overwrite", "--keep", "first*=rtn:bits=99,group=0", says="bits is 99")


@pytest.mark.parametrize("below", ["", "deep/er"])
def test_the_source_is_never_replaced(refused: Refused, lab: Any, tmp_path: Path, below: str) -> None:
    folder = tmp_path / "models" / below
    folder.mkdir(parents=True)
    file = lab.write_bare(folder / "bare.safetensors")
    says = "holds the source, which would be replaced"
    refused(file, "--ratio", "4", "--overwrite", out=tmp_path / "models", says=says)
    with pytest.raises(octavo.RequestError, match=says):
        octavo.compress(file, ratio=4, preset="fast").save(tmp_path / "models", overwrite=True, report=False)


def test_an_output_that_is_a_file(refused: Refused, bare: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    for option in ([], ["--overwrite"]):
        refused(bare, "--ratio", "4", *option, says="out: is a file, not a folder; name a folder")
    (tmp_path / "out").unlink()
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out"):
        refused(bare, "--ratio", "4", out=out, says="cannot be written")


@pytest.mark.parametrize("out", ["/proc/out", "/proc/self/out", "/dev/null/out"])
def test_an_output_that_cannot_be_written(command: Command, bare: Path, out: str) -> None:
    result = command("compress", bare, *FAST, "--ratio", "4", "--out", out)
    assert result.code == 2 and f"{out}: cannot be written" in result.said.replace(str(os.getpid()), "self")


def test_parents_are_made_for_a_success_only(command: Command, bare: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "out"
    assert command("compress", bare, *FAST, "--ratio", "1e6", "--out", out).code == 3
    assert command("compress", bare, "--ratio", "0", "--out", out).code == 2
    assert list(tmp_path.iterdir()) == []
    assert command("compress", bare, *FAST, "--ratio", "4", "--out", out).code == 0
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_link_to_a_folder_stays_one(command: Command, bare: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert command("compress", bare, *FAST, "--ratio", "4", "--out", tmp_path / "link").code == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "octavo.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_the_current_folder(command: Command, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert command("compress", bare, *FAST, "--ratio", "4", "--out", ".").code == 0
    assert (tmp_path / "here" / "octavo.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here"]


def test_the_user_s_module_is_as_it_was(lab: Any, tmp_path: Path) -> None:
    module = lab.net()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    batches = [torch.randn(16, 3, 8, 8)]
    octavo.compress(module, ratio=2, data=batches, preset="fast").save(tmp_path / "out", report=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in module.parameters())
    assert not any(inner._forward_hooks or inner._forward_pre_hooks for inner in module.modules())


def test_plans_are_written_whole_or_not(command: Command, bare: Path, tmp_path: Path) -> None:
    assert command("profile", bare, "--out", tmp_path / "measured", "--preset", "fast").code == 0
    result = command("plan", tmp_path / "measured", "--ratio", "6", "--out", tmp_path / "missing" / "plan.yaml")
    assert result.code == 1 and "plan.yaml: cannot be written" in result.said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["measured"]
    assert not list((tmp_path / "measured").rglob("*.octavo-new.*"))


def heavy(lab: Any, file: Path) -> Path:
    """Weights whose artifact is larger than what the disks and limits below let through."""
    return lab.write_bare(file, third=torch.randn(512, 512))


def test_work_that_cannot_be_written(lab: Any, tmp_path: Path) -> None:
    """No file of more than 50 kB can be written: the work fails as on a full disk, and goes on when there is room."""
    source = heavy(lab, tmp_path / "x.safetensors")
    (tmp_path / "outputs").mkdir()
    out = tmp_path / "outputs" / "out"
    words = ("compress", source, "--ratio", "4", "--preset", "fast", "--out", out)
    result = lab.spawn(*words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)))
    assert result.code == 1 and "Traceback" not in result.err, result.out + result.err
    assert "error: OctavoError: " in result.err and "cannot be written: File too large" in result.err
    assert f"unfinished work is kept in {out.parent}/.out.octavo-work; --resume continues it" in result.err
    assert [path.name for path in out.parent.iterdir()] == [".out.octavo-work"]
    assert not list(out.parent.rglob("*.octavo-new.*"))
    assert lab.spawn(*words, "--resume").code == 0
    assert [path.name for path in out.parent.iterdir()] == ["out"]


_SAVE = """
import resource, sys
import octavo
done = octavo.compress(sys.argv[1], ratio=4, preset="fast")
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try: done.save(sys.argv[2], overwrite=True)
except octavo.OctavoError as error: print(error)
"""


def test_an_output_that_cannot_be_written_in_whole(lab: Any, tmp_path: Path) -> None:
    source = heavy(lab, tmp_path / "x.safetensors")
    out = tmp_path / "outputs" / "out"
    out.mkdir(parents=True)
    (out / "octavo.json").write_text("mine")
    words = [sys.executable, "-c", _SAVE, str(source), str(out)]
    done = subprocess.run(words, env=lab.environment(), capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{out}: cannot be written: File too large; nothing was left there\n", done.stderr
    assert lab.tree(out.parent) == {"out": None, "out/octavo.json": b"mine"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with less room than a run takes, by so little that it is tried."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    words = [str(mount), "-t", "tmpfs", "-o", "size=1600k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or mount is None or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("a disk can be mounted by root only, and not everywhere")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(command: Command, lab: Any, small_disk: Path, tmp_path: Path) -> None:
    source = heavy(lab, tmp_path / "x.safetensors")
    old = small_disk / "out"
    old.mkdir()
    (old / "octavo.json").write_text("mine")
    result = command("compress", source, "--ratio", "4", "--preset", "fast", "--out", old, "--overwrite")
    assert result.code == 1 and "No space left on device" in result.said, result.err
    assert lab.tree(old) == {"octavo.json": b"mine"}
    assert {path.name for path in small_disk.iterdir()} <= {"out", ".out.octavo-work"}
    assert not list(small_disk.rglob("*.octavo-new.*"))


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=300k,ro", "tmpfs", str(folder)]
    if os.geteuid() != 0 or not shutil.which("mount") or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("a disk can be mounted by root only, and not everywhere")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_read_only_disk(refused: Refused, bare: Path, read_only_disk: Path) -> None:
    refused(bare, "--ratio", "4", out=read_only_disk / "out", says="cannot be written: Read-only file system")


@pytest.mark.parametrize("what", ["--data", "--plan", "--profile"])
def test_what_is_read_is_never_replaced(
    command: Command, refused: Refused, lab: Any, bert: Path, texts: Path, tmp_path: Path, what: str
) -> None:
    out = tmp_path / "folded"
    out.mkdir()
    (out / "octavo.json").write_text("{}")
    read = out / "read"
    if what == "--data":
        shutil.copy(texts, read)
    else:
        assert command("profile", bert, "--preset", "fast", "--data", texts, "--out", read).code == 0
        read = read if what == "--profile" else read / "request.json"
    size = [] if what == "--plan" else ["--ratio", "4"]
    refused(bert, *size, what, read, "--overwrite", out=out, says=f"holds {read}, which would be replaced")


@pytest.mark.parametrize("what", ["source", "data"])
def test_work_never_replaces_what_is_read(
    command: Command, lab: Any, bert: Path, texts: Path, tmp_path: Path, what: str
) -> None:
    work = tmp_path / "work"
    assert command("profile", bert, "--preset", "fast", "--data", texts, "--out", work).code == 0
    source = shutil.copytree(bert, work / "bert") if what == "source" else bert
    data = shutil.copy(texts, work / "texts.txt") if what == "data" else texts
    before = lab.tree(work)
    result = command("profile", source, "--preset", "fast", "--data", data, "--out", work, "--overwrite")
    assert result.code == 2 and "which would be removed" in result.said
    with pytest.raises(octavo.RequestError, match="which would be removed"):
        octavo.compress(source, ratio=4, preset="fast", data=data, workspace=work)
    assert lab.tree(work) == before
