"""Kept work that was damaged, and sources that change, never lead to other bytes with exit 0."""

import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import octavo
from octavo.allocation.workspace import Workspace

COUNTED = ("model.safetensors", "octavo.json")
REQUEST: dict[str, Any] = {"ratio": 3, "methods": ["entropy", "rtn"], "preset": "fast"}
#: What is made again when it is damaged; the rest is refused.
AGAIN = ("calibration.json", "profile.json", "curves", "points")


def unfinished(source: Path, data: Path | None, work: Path, **more: Any) -> None:
    """The workspace of a run that ended before it was saved."""
    octavo.compress(source, data=data, workspace=work, **{**REQUEST, **more})


@pytest.fixture(scope="module")
def bert(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer, so that a run takes a moment."""
    return Path(lab.write_bert(tmp_path_factory.mktemp("one") / "bert", layers=1, hidden=32))


@pytest.fixture(scope="module")
def kept(bert: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """Kept work, and what comes of it undisturbed."""
    folder = tmp_path_factory.mktemp("kept")
    unfinished(bert, texts, folder / "work")
    octavo.compress(bert, data=texts, **REQUEST).save(folder / "out")
    return folder / "work", {name: (folder / "out" / name).read_bytes() for name in COUNTED}


def outcome(source: Path, data: Path | None, work: Path, out: Path) -> dict[str, bytes] | str:
    """What a run that goes on writes, or why it is refused."""
    try:
        done = octavo.compress(source, data=data, workspace=work, resume=True, **REQUEST)
        done.save(out, report=False)
    except octavo.OctavoError as error:
        return str(error)
    assert any("was damaged and is made again" in str(note) for note in done.notes)
    return {name: (out / name).read_bytes() for name in COUNTED}


def flip(file: Path, seed: int) -> None:
    content, chance = bytearray(file.read_bytes()), random.Random(seed)
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def cut(file: Path, seed: int) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: random.Random(seed).randrange(len(content))])


def swap(file: Path, seed: int) -> None:
    other = next(path for path in sorted(file.parent.glob(f"*{file.suffix}")) if path != file)
    content = file.read_bytes()
    file.write_bytes(other.read_bytes())
    other.write_bytes(content)


EVERY = ("job.json", "way.json", "calibration.json", "profile.json", "evidence", "curves", "points")


@pytest.mark.parametrize(
    ("name", "harm"), [*((name, harm) for name in EVERY for harm in (flip, cut)), ("curves", swap), ("points", swap)]
)
def test_damaged_work_is_made_again_or_refused(
    kept: tuple[Path, dict[str, bytes]], bert: Path, texts: Path, tmp_path: Path, name: str, harm: Callable
) -> None:
    work = tmp_path / "work"
    shutil.copytree(kept[0], work)
    if name in ("curves", "calibration.json"):
        (work / "profile.json").unlink()
    if name == "points" or harm is swap:
        # Of all of them, so that those are among them that this run needs.
        files = sorted((work / name).glob("*")) if (work / name).is_dir() else [work / name]
        files = files[:: 2 if harm is swap else 1]
    else:
        files = [min((work / name).glob("*"))] if (work / name).is_dir() else [work / name]
    for seed, file in enumerate(files):
        harm(file, seed)
    found = outcome(bert, texts, work, tmp_path / "out")
    if name in AGAIN:
        assert found == kept[1]
    else:
        assert isinstance(found, str) and "damaged" in found and str(work) in found


def test_work_of_another_job_is_no_use(bert: Path, texts: Path, tmp_path: Path) -> None:
    unfinished(bert, texts, tmp_path / "one")
    unfinished(bert, texts, tmp_path / "other", seed=1)
    for name in ("evidence/whole.safetensors", "way.json"):
        shutil.copy(tmp_path / "other" / name, tmp_path / "one" / name)
        found = outcome(bert, texts, tmp_path / "one", tmp_path / "out")
        assert isinstance(found, str) and "damaged" in found


def test_a_damaged_profile_is_not_solved(bare: Path, tmp_path: Path) -> None:
    octavo.profile(bare, tmp_path / "measured", preset="fast")
    for name, ask in (
        ("profile.json", lambda: octavo.plan(tmp_path / "measured", ratio=4)),
        ("request.json", lambda: octavo.pipeline.saved_choices(tmp_path / "measured")),
    ):
        whole = (tmp_path / "measured" / name).read_bytes()
        for seed in range(8):
            flip(tmp_path / "measured" / name, seed)
            with pytest.raises(octavo.RequestError, match="checksum mismatch"):
                ask()
            (tmp_path / "measured" / name).write_bytes(whole)
        ask()


CHANGES: dict[str, Callable[[Path], object]] = {
    "config.json": lambda file: file.write_text(file.read_text().replace("0.1", "0.2")),
    "tokenizer.json": lambda file: file.write_text(file.read_text() + "\n"),
    "tokenizer_config.json": lambda file: file.unlink(),
    "model.safetensors": lambda file: flip_last(file),
    "texts.txt": lambda file: file.write_text(file.read_text().replace("ship", "king")),
}


def flip_last(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


@pytest.fixture
def own(bert: Path, texts: Path, tmp_path: Path) -> Path:
    """A copy of the sources."""
    shutil.copytree(bert, tmp_path / "bert")
    shutil.copy(texts, tmp_path / "texts.txt")
    return tmp_path


@pytest.mark.parametrize("name", CHANGES)
def test_files_that_changed_before_a_run_goes_on_are_named(own: Path, name: str) -> None:
    unfinished(own / "bert", own / "texts.txt", own / "work")
    file = own / name if (own / name).exists() else own / "bert" / name
    CHANGES[name](file)
    with pytest.raises(octavo.RequestError, match="holds the work of another job") as caught:
        octavo.compress(own / "bert", data=own / "texts.txt", workspace=own / "work", resume=True, **REQUEST)
    changed = str(caught.value).partition("; changed since then: ")[2].partition(";")[0]
    assert (str(own / "bert") if name == "model.safetensors" else name) in changed


@pytest.mark.parametrize("name", CHANGES)
def test_files_that_change_during_a_run_are_named(own: Path, name: str) -> None:
    file = own / name if (own / name).exists() else own / "bert" / name
    changed = threading.Event()

    def step(stage: str, done: int, total: int) -> None:
        if stage == "profile" and not changed.is_set():
            changed.set()
            CHANGES[name](file)

    with pytest.raises(octavo.RequestError, match=f"{name}: was (changed|removed) since the run began"):
        octavo.compress(own / "bert", data=own / "texts.txt", workspace=own / "work", progress=step, **REQUEST)
    assert changed.is_set()


def test_files_that_change_before_the_result_is_saved_are_named(own: Path) -> None:
    done = octavo.compress(own / "bert", data=own / "texts.txt", **REQUEST)
    (own / "bert" / "generation_config.json").write_text("{}")
    with pytest.raises(octavo.RequestError, match=r"generation_config.json: was added since the run began"):
        done.save(own / "out", report=False)
    assert not (own / "out").exists()


@pytest.mark.parametrize("what", ["folder", "cut"])
def test_a_source_that_is_gone_is_one_clear_error(lab: Any, own: Path, what: str) -> None:
    out, weights = own / "out", own / "bert" / "model.safetensors"
    words = ("compress", own / "bert", "--data", own / "texts.txt", "--ratio", "3", "--preset", "fast", "--out", out)
    ended: list[Any] = []
    thread = threading.Thread(target=lambda: ended.append(lab.spawn(*words)))
    thread.start()
    deadline = time.monotonic() + 60
    while not (own / ".out.octavo-work" / "job.json").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    if what == "folder":
        shutil.rmtree(own / "bert")
    else:
        os.truncate(weights, 1000)
    thread.join()
    assert ended[0].code in (1, 2) and "Traceback" not in ended[0].err, ended[0].err
    assert ended[0].err.count("error: ") == 1 and str(own / "bert") in ended[0].said.replace(" ", "")


def test_scratch_of_a_killed_run_is_swept(tmp_path: Path) -> None:
    Workspace(tmp_path / "room", {"a": 1}, resume=False)
    (tmp_path / "room" / "octavo-states-x" / "0").mkdir(parents=True)
    Workspace(tmp_path / "room", {"a": 1}, resume=True)
    assert not (tmp_path / "room" / "octavo-states-x").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_file_that_is_gone_before_a_run_goes_on_is_named(own: Path, name: str) -> None:
    unfinished(own / "bert", own / "texts.txt", own / "work")
    (own / "bert" / name).unlink()
    with pytest.raises(octavo.RequestError, match=f"work on files that were changed since then: {name}"):
        octavo.compress(own / "bert", data=own / "texts.txt", workspace=own / "work", resume=True, **REQUEST)


@pytest.mark.parametrize("way", ["profile", "frontier", "workspace"])
def test_work_inside_of_the_source_is_no_part_of_it(own: Path, way: str) -> None:
    source, work = own / "bert", own / "bert" / "measured"
    request: dict[str, Any] = {"data": own / "texts.txt", "preset": "fast"}
    if way == "profile":
        octavo.profile(source, work, **request)
    elif way == "frontier":
        octavo.frontier(source, [4], workspace=work, **request)
    done = octavo.compress(source, ratio=4, workspace=work, resume=True, **request)
    done.save(source / "folded", report=False)
    assert not (source / "folded" / "measured").exists()
    assert not any("measured" in str(note) for note in done.notes)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "texts.txt"])
def test_files_that_are_touched_during_a_run_and_not_changed_are_no_matter(own: Path, name: str) -> None:
    def touch(step: str, done: int, total: int) -> None:
        file = own / name if (own / name).exists() else own / "bert" / name
        shutil.copy(file, own / "copy")
        os.replace(own / "copy", file)

    done = octavo.compress(own / "bert", ratio=4, data=own / "texts.txt", preset="fast", progress=touch)
    assert done.save(own / "folded")["artifact"]["ratio"] >= 4


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "texts.txt"])
def test_a_refusal_leaves_no_empty_folder(own: Path, name: str) -> None:
    file = own / name if (own / name).exists() else own / "bert" / name

    def change(step: str, done: int, total: int) -> None:
        file.write_bytes(file.read_bytes() + b" ")

    with pytest.raises(octavo.OctavoError):
        octavo.compress(own / "bert", ratio=4, data=own / "texts.txt", workspace=own / "work", progress=change)
    assert not (own / "work").exists()
