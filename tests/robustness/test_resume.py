"""A killed run, continued, writes what it would have written uninterrupted, byte for byte."""

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import octavo

#: A fixture of conftest.py: a command run in this process.
Command = Callable[..., Any]
COUNTED = ("model.safetensors", "octavo.json")
#: What :func:`interrupted` asked for, as words.
ASKED = ("--ratio", "4", "--preset", "fast")
REQUEST = ("--ratio", "3", "--methods", "entropy,rtn")


@pytest.fixture(scope="module")
def sources(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model that takes some seconds, so that it can be killed at every stage, and its texts."""
    folder = tmp_path_factory.mktemp("sources")
    return lab.write_bert(folder / "bert", layers=2, hidden=32), lab.write_texts(folder / "texts.txt", 160)


@pytest.fixture(scope="module")
def whole(sources: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted run writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    octavo.compress(sources[0], ratio=3, methods=["entropy", "rtn"], data=sources[1]).save(out)
    return {name: (out / name).read_bytes() for name in COUNTED}


def kill_when(words: list[str], environment: dict[str, str], reached: Callable[[], bool]) -> bool:
    """Start a command and kill it as soon as ``reached``; whether it was still at work then."""
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    try:
        while process.poll() is None and not reached() and time.monotonic() < deadline:
            time.sleep(0.001)
    finally:
        process.kill()
    return process.wait() == -signal.SIGKILL


#: By stage, what the workspace holds as soon as it is reached.
STAGES: dict[str, Callable[[Path], bool]] = {
    "evidence": lambda work: (work / "points").is_dir(),
    "profile": lambda work: len(list((work / "curves").glob("*.json"))) >= 4,
    "encode": lambda work: (work / "profile.json").is_file(),
}
BEFORE = {"evidence": "calibration.json", "profile": "profile.json"}


def test_a_killed_run_continues(
    lab: Any, command: Command, sources: tuple[Path, Path], whole: dict[str, bytes], tmp_path: Path
) -> None:
    """One run that is killed at every stage, each time after it went on from the stage before."""
    out = tmp_path / "out"
    work = tmp_path / ".out.octavo-work"
    words = ("compress", sources[0], *REQUEST, "--data", sources[1], "--out", out)
    for stage, reached in STAGES.items():
        begun = ["--resume"] if work.is_dir() else []
        assert kill_when(lab.arguments(*words, *begun), lab.environment(), partial(reached, work))
        assert not out.exists() and work.is_dir()
        assert stage not in BEFORE or not (work / BEFORE[stage]).exists(), "killed too late"
    assert list((work / "curves").glob("*.json"))
    result = command(*words, "--resume")
    assert result.code == 0, result.err
    assert {name: (out / name).read_bytes() for name in COUNTED} == whole
    # A run that was killed while it wrote its output leaves that aside; one killed at work leaves nothing.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def interrupted(bare: Path, out: Path, **request: Any) -> Path:
    """The workspace of a command that got as far as its profile."""
    work = out.parent / f".{out.name}.octavo-work"
    octavo.compress(bare, workspace=work, **{"ratio": 4, "preset": "fast", **request})
    return work


def test_finished_curves_are_not_measured_again(command: Command, bare: Path, tmp_path: Path) -> None:
    work = interrupted(bare, tmp_path / "out")
    (work / "profile.json").unlink()
    before = {path: path.read_bytes() for path in (work / "curves").iterdir()}
    assert len(before) == 2
    last = max(before)
    last.unlink()
    shutil.copytree(work, tmp_path / "copy")
    octavo.compress(bare, ratio=4, preset="fast", workspace=tmp_path / "copy", resume=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "copy" / "curves").iterdir()} == {
        path.name: content for path, content in before.items()
    }
    result = command("compress", bare, *ASKED, "--out", tmp_path / "out", "--resume")
    assert result.code == 0 and not work.exists()


@pytest.mark.parametrize(
    ("other", "odd"),
    [
        (["--seed", "1"], "seed"),
        (["--preset", "default"], "methods, preset"),
        (["--methods", "rtn"], "methods"),
        (["--ignore", "first*"], "sites"),
        (["--keep", "first*=float16"], "pinned"),
    ],
)
def test_another_request_is_refused(
    command: Command, lab: Any, bare: Path, tmp_path: Path, other: list[str], odd: str
) -> None:
    interrupted(bare, tmp_path / "out")
    before = lab.tree(tmp_path)
    result = command("compress", bare, *ASKED, "--out", tmp_path / "out", "--resume", *other)
    assert result.code == 2 and f"holds the work of another job (different: {odd})" in result.said, result.err
    assert "run without --resume to start over" in result.said
    assert lab.tree(tmp_path) == before


def test_other_data_and_sources_are_refused(
    command: Command, lab: Any, bert: Path, texts: Path, bare: Path, tmp_path: Path
) -> None:
    interrupted(bert, tmp_path / "out", data=texts)
    words = ("--ratio", "4", "--preset", "fast", "--out", tmp_path / "out", "--resume")
    other = lab.write_texts(tmp_path / "other.txt", seed=1)
    for source, data, odd in ((bert, ["--data", other], "data"), (bare, [], "data, objective, sites, source")):
        result = command("compress", source, *data, *words)
        assert result.code == 2 and f"(different: {odd})" in result.said, result.err
    assert command("compress", bert, "--data", texts, *words).code == 0


def test_another_budget_is_not_another_job(command: Command, bare: Path, tmp_path: Path) -> None:
    interrupted(bare, tmp_path / "out")
    octavo.compress(bare, ratio=5, preset="fast").save(tmp_path / "anew", report=False)
    result = command("compress", bare, "--ratio", "5", "--preset", "fast", "--out", tmp_path / "out", "--resume")
    assert result.code == 0, result.err
    for name in COUNTED:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "anew" / name).read_bytes()


def test_without_resume_old_work_is_discarded(command: Command, bare: Path, tmp_path: Path) -> None:
    work = interrupted(bare, tmp_path / "out", seed=1)
    (work / "calibration.json").write_text("damaged")
    assert command("compress", bare, *ASKED, "--out", tmp_path / "out").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("job.json", b""), ("job.json", b"\xff"), ("calibration.json", b"["), ("evidence", b""), ("evidence", b"\xff"),
        ("profile.json", b""), ("curves", b"["),
    ],
)  # fmt: skip
def test_damaged_work_is_named(command: Command, bare: Path, tmp_path: Path, name: str, content: bytes) -> None:
    work = interrupted(bare, tmp_path / "out")
    file = min((work / name).iterdir()) if (work / name).is_dir() else work / name
    if name == "curves":
        (work / "profile.json").unlink()
    file.write_bytes(content)
    result = command("compress", bare, *ASKED, "--out", tmp_path / "out", "--resume")
    if name in ("calibration.json", "profile.json", "curves"):
        # Made again, and a note says so.
        assert result.code == 0 and "kept work was damaged and is made again" in result.out, result.err
        return
    assert result.code == 2 and file.name in result.said and "damaged" in result.said, result.err


@pytest.mark.parametrize("length", [0, 50, -1])
def test_a_form_that_did_not_reach_the_disk_is_made_again(
    command: Command, bare: Path, tmp_path: Path, length: int
) -> None:
    octavo.compress(bare, ratio=4, preset="fast").save(tmp_path / "anew")
    work = interrupted(bare, tmp_path / "out")
    for file in (work / "points").iterdir():
        content = file.read_bytes()
        file.write_bytes(content[:length] if length >= 0 else bytes(len(content)))
    assert command("compress", bare, *ASKED, "--out", tmp_path / "out", "--resume").code == 0
    for name in COUNTED:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "anew" / name).read_bytes()


def test_a_profile_resumes_and_stays(command: Command, lab: Any, bare: Path, tmp_path: Path) -> None:
    out = tmp_path / "measured"
    assert command("profile", bare, "--out", out, "--preset", "fast").code == 0
    before = lab.tree(out)
    assert command("profile", bare, "--out", out, "--preset", "fast").code == 2
    assert command("profile", bare, "--out", out, "--preset", "fast", "--resume").code == 0
    assert lab.tree(out) == before
    for number, ratio in enumerate(("3", "8")):
        folded = tmp_path / f"{number}"
        assert command("compress", bare, "--ratio", ratio, "--profile", out, "--out", folded).code == 0
    assert set(lab.tree(out)) >= set(before)


def test_the_interrupt_of_a_keyboard_says_how_to_continue(lab: Any, sources: tuple[Path, Path], tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / ".out.octavo-work"
    words = lab.arguments("compress", sources[0], *REQUEST, "--data", sources[1], "--out", out)
    # A test run in the background of a shell ignores interrupts, and its children would inherit that.
    with subprocess.Popen(
        words,
        env=lab.environment(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        while process.poll() is None and not (work / "calibration.json").is_file():
            time.sleep(0.005)
        # Python loses an interrupt that arrives inside a finalizer; a person presses the keys again.
        while process.poll() is None:
            os.kill(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.2)
        said = process.stderr.read()
    assert process.returncode == 130
    assert said.strip() == "interrupted; run the same command with --resume to continue"
    assert not out.exists() and work.is_dir()


@pytest.mark.parametrize(
    ("words", "how"),
    [
        (("evaluate", "--against", "SOURCE"), "again"),
        (("export", "model.onnx"), "again"),
        (("compress", "--ratio", "4", "--out", "out"), "with --resume to continue"),
    ],
)
def test_an_interrupt_names_only_options_that_a_command_has(
    command: Command, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], how: str
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("texts.txt")

    def press() -> None:
        # Opened as soon as the command reads its data, when nothing is being imported.
        with open("texts.txt", "wb"):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=press, daemon=True).start()
        name, *rest = (str(bert) if word == "SOURCE" else word for word in words)
        result = command(name, bert, *rest, "--data", "texts.txt")
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.code == 130 and result.said == f"interrupted; run the same command {how}"
