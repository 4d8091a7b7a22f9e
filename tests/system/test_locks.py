"""One run at a time in a folder."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import octavo
from octavo.system.locks import Lock

HOLD = """
import sys, time
from octavo.system.locks import Lock
lock = Lock(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""
RUN = "from octavo.cli import main; main()"


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    file = tmp_path / "source" / "bare.safetensors"
    file.parent.mkdir()
    save_file({"one": torch.randn(64, 64), "two": torch.randn(96, 64)}, file)
    return file


@contextlib.contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a folder."""
    words = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def compress(source: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", RUN, "compress", str(source), "--ratio", "3", "--preset", "fast", "--out", str(out)]
    return subprocess.run([*words, *more], capture_output=True, text=True, timeout=120, check=False)


def test_the_second_is_refused_and_names_the_first(tmp_path: Path) -> None:
    out = tmp_path / "out"
    says = r"out: is in use by another run, process {} \("
    with holder(out) as process, pytest.raises(octavo.RequestError, match=says.format(process.pid)):
        Lock(out)
    assert not out.exists()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with holder(out) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / ".out.octavo-lock").exists()
        with Lock(out):
            assert (tmp_path / ".out.octavo-lock").read_text().startswith(f"{os.getpid()} (")
    assert list(tmp_path.iterdir()) == []


def test_it_is_given_back(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "out"
    with contextlib.suppress(ZeroDivisionError), Lock(out), Lock(out):
        assert out.parent.is_dir()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == [], "folders that were made for it are gone"
    with Lock(out):
        out.mkdir()
    assert list(out.parent.iterdir()) == [out]


def test_another_thread_is_another_run(tmp_path: Path) -> None:
    refused = []

    def second() -> None:
        with contextlib.suppress(octavo.RequestError):
            Lock(tmp_path / "out")
            return
        refused.append(True)

    with Lock(tmp_path / "out"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert refused
    Lock(tmp_path / "out").release()


def test_a_forked_child_does_not_hold_it(tmp_path: Path) -> None:
    code = """
import os, sys, time
from octavo.system.locks import Lock
lock = Lock(sys.argv[1])
if os.fork() == 0:
    os.close(1)
    time.sleep(20)
    os._exit(0)
print("held", flush=True)
"""
    words = [sys.executable, "-c", code, str(tmp_path / "out")]
    assert subprocess.run(words, stdout=subprocess.PIPE, text=True, timeout=60, check=True).stdout == "held\n"
    Lock(tmp_path / "out").release()


def test_a_command_is_refused_and_harms_nothing(bare: Path, tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / ".out.octavo-work"
    octavo.compress(bare, ratio=3, preset="fast", workspace=work)
    before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    with holder(out) as process:
        done = compress(bare, out, "--overwrite")
        assert done.returncode == 2 and f"is in use by another run, process {process.pid}" in done.stderr
    assert {path: path.read_bytes() for path in work.rglob("*") if path.is_file()} == before
    assert not out.exists()
    assert compress(bare, out).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_saving_and_profiles_are_refused_as_well(bare: Path, tmp_path: Path) -> None:
    done = octavo.compress(bare, ratio=3, preset="fast")
    with holder(tmp_path / "out"):
        for run in (
            lambda: done.save(tmp_path / "out"),
            lambda: octavo.profile(bare, tmp_path / "out", preset="fast"),
            lambda: octavo.compress(bare, ratio=3, preset="fast", workspace=tmp_path / "out"),
            lambda: octavo.frontier(bare, [3], workspace=tmp_path / "out", preset="fast"),
        ):
            with pytest.raises(octavo.RequestError, match="is in use by another run"):
                run()
    assert not (tmp_path / "out").exists()
    done.save(tmp_path / "out")
    assert octavo.verify(tmp_path / "out").weights_match


def test_a_workspace_is_held_for_as_long_as_its_forms_are_needed(bare: Path, tmp_path: Path) -> None:
    work, code = tmp_path / "work", "import sys; from octavo.system.locks import Lock; Lock(sys.argv[1])"
    words = [sys.executable, "-c", code, str(work)]
    done = octavo.compress(bare, ratio=3, preset="fast", workspace=work)
    assert b"is in use by another run" in subprocess.run(words, capture_output=True, check=False).stderr
    done.save(tmp_path / "out", report=False)
    del done
    assert subprocess.run(words, check=False).returncode == 0


def test_what_a_killed_writer_left_is_put_right(bare: Path, tmp_path: Path) -> None:
    done = octavo.compress(bare, ratio=3, preset="fast")
    (tmp_path / ".out.octavo-new.x1" / "deep").mkdir(parents=True)
    old = tmp_path / ".out.octavo-old.x2" / "folder"
    old.mkdir(parents=True)
    (old / "mine.txt").write_text("mine")
    (old / "octavo.json").write_text("{}")
    with pytest.raises(octavo.RequestError, match="the folder is not empty"):
        done.save(tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    done.save(tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "mine.txt").exists()


def test_a_refused_command_leaves_an_older_profile_alone(bare: Path, tmp_path: Path) -> None:
    octavo.profile(bare, tmp_path / "measured", preset="fast")
    before = sorted((tmp_path / "measured").rglob("*"))
    words = ["profile", str(tmp_path / "nowhere"), "--out", str(tmp_path / "measured"), "--overwrite"]
    assert subprocess.run([sys.executable, "-c", RUN, *words], capture_output=True, check=False).returncode == 2
    assert sorted((tmp_path / "measured").rglob("*")) == before


def test_two_runs_at_once(bare: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    large = tmp_path / "source" / "large.safetensors"
    save_file({f"{k}": torch.randn(256, 256) for k in range(12)}, large)
    out, words = tmp_path / "out", [sys.executable, "-c", RUN, "compress"]
    with subprocess.Popen([*words, str(large), "--ratio", "4", "--out", str(out)], stderr=subprocess.PIPE) as first:
        while first.poll() is None and not (tmp_path / ".out.octavo-work" / "job.json").exists():
            time.sleep(0.01)
        second = compress(bare, out, "--overwrite")
        first.communicate()
    assert (first.returncode, second.returncode) == (0, 2)
    assert f"is in use by another run, process {first.pid} (" in second.stderr
    assert len(octavo.load(out)) == 12
