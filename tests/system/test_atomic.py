"""Files and folders that are written appear whole or not at all, under one kind of name until then."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.errors import OctavoError
from octavo.system.atomic import made_aside, move_into_place, sweep, tidy, write_file, writing


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("flush", [True, False])
def test_a_file_replaces_another_and_leaves_nothing_beside_it(tmp_path: Path, flush: bool) -> None:
    file = tmp_path / "a"
    write_file(file, b"old")
    write_file(file, b"one ", b"two", flush=flush)
    assert file.read_bytes() == b"one two" and names(tmp_path) == ["a"]
    assert file.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_stops_a_writer_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    write_file(tmp_path / "a", b"old")
    with pytest.raises(error), writing(tmp_path / "a") as aside:
        aside.write_bytes(b"half")
        raise error
    assert (tmp_path / "a").read_bytes() == b"old" and names(tmp_path) == ["a"]


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    file = tmp_path / "a"
    with writing(file) as first, writing(file) as second:
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert file.read_bytes() == b"first" and names(tmp_path) == ["a"]


def test_an_error_names_the_path_and_the_cause(tmp_path: Path) -> None:
    with pytest.raises(OctavoError, match=r"missing/a: cannot be written: No such file or directory$"):
        write_file(tmp_path / "missing" / "a", b"new")


_LIMITED = """
import resource, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from octavo.errors import OctavoError
from octavo.system.atomic import write_file, writing
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
file = Path(sys.argv[1])
try: write_file(file, bytes(2000))
except OctavoError as error: print(error)
try:
    with writing(file) as aside:
        save_file({"x": torch.zeros(1000)}, aside)
except OctavoError as error: print(error)
"""


def test_a_file_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "a"
    words = [sys.executable, "-c", _LIMITED, str(file)]
    said = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    assert said[0] == f"{file}: cannot be written: File too large"
    assert said[1].startswith(f"{file}: cannot be written: ") and "too large" in said[1] and names(tmp_path) == []


def test_a_folder_replaces_another(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for content in (b"one", b"two"):
        aside = made_aside(out)
        (aside / "deep").mkdir()
        (aside / "deep" / "file").write_bytes(content)
        move_into_place(aside, out)
    assert (out / "deep" / "file").read_bytes() == b"two" and names(tmp_path) == ["out"]
    assert out.stat().st_mode & 0o777 == 0o755


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    made_aside(out)
    (tmp_path / ".out.octavo-new.1234").write_bytes(b"half of a file")
    (tmp_path / ".outer.octavo-new.1234").write_bytes(b"of another output")
    tidy(out)
    assert names(tmp_path) == [".outer.octavo-new.1234"]
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / ".a.octavo-new.1234").write_bytes(b"half")
    sweep(tmp_path)
    assert names(tmp_path) == ["deep"] and names(tmp_path / "deep") == []
