"""Progress that is shown where somebody can see it, and the report that can be left out."""

import logging
import os
import pty
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import octavo
from octavo.system.progress import Estimates, spoken

#: Compresses once with each kind of progress, with a line of :data:`NEXT` between what was said of them.
RUN = """
import builtins, sys, torch, octavo
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
class ZMQInteractiveShell: pass
for number, progress in enumerate({kinds}):
    if progress == "notebook":
        builtins.get_ipython = lambda: ZMQInteractiveShell()
        progress = None
    done = octavo.compress(
        model, ratio=3, data=[torch.randn(32, 64)], objective="squared", preset="fast", methods=["rtn"], progress=progress
    )
    done.save(f"{{sys.argv[1]}}-{{number}}", progress=progress, report=False)
    print("next", file=sys.stderr)
"""
NEXT = "next"


def in_terminal(code: str, *words: str) -> str:
    """What a script writes to standard error when that is a terminal."""
    ours, theirs = pty.openpty()
    parts: list[bytes] = []

    def read() -> None:
        try:
            while part := os.read(ours, 1000):
                parts.append(part)
        except OSError:  # the other side is closed
            return

    reader = threading.Thread(target=read)
    reader.start()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    subprocess.run([sys.executable, "-c", code, *words], stderr=theirs, env=environment, check=True, timeout=120)
    os.close(theirs)
    reader.join()
    os.close(ours)
    return b"".join(parts).decode()


def in_file(code: str, *words: str) -> str:
    """What it writes when that is none."""
    words = (sys.executable, "-W", "ignore", "-c", code, *words)
    return subprocess.run(words, capture_output=True, check=True, timeout=120).stderr.decode()


STEPS = ("Gathering evidence", "Measuring curves", "Encoding", "Writing", "Reading back")


def test_bars_in_a_terminal(tmp_path: Path) -> None:
    bars, silence, _ = in_terminal(RUN.format(kinds="(None, False)"), str(tmp_path / "out")).split(NEXT)
    for step in STEPS:
        assert step in bars
    assert "Encoding" not in silence


def test_silence_where_nobody_looks_and_a_line_in_a_notebook(tmp_path: Path) -> None:
    kinds = '(None, True, "notebook")'
    silence, loud, notebook, _ = in_file(RUN.format(kinds=kinds), str(tmp_path / "out")).split(NEXT)
    assert silence == "" and "Encoding" in loud
    for step in STEPS:
        assert f"\r{step}" in notebook
    assert "\x1b" not in notebook and " 2/2 " in notebook


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))


def test_a_callback_is_told_every_step(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    done = octavo.compress(net(), ratio=3, preset="fast", progress=lambda *step: seen.append(step))
    assert {step for step, _, _ in seen} >= {"open", "profile", "encode"}
    assert all(0 < at <= total for _, at, total in seen)
    before = len(seen)
    done.save(tmp_path / "out")
    assert {step for step, _, _ in seen[before:]} >= {"write", "verify"}
    before = len(seen)
    done.save(tmp_path / "again", progress=False)
    assert len(seen) == before
    octavo.profile(net(), tmp_path / "measured", preset="fast", progress=lambda *step: seen.append(step))
    assert len(seen) > before
    before = len(seen)
    octavo.frontier(net(), [3], workspace=tmp_path / "f", preset="fast", progress=lambda *step: seen.append(step))
    assert len(seen) > before


def test_long_work_is_estimated_in_the_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 6.0, 10.0, 10.0, 13.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    tell = Estimates()
    with caplog.at_level(logging.INFO, "octavo"):
        for done in (1, 2, 3, 4):
            tell("profile", done, 101)
        tell("encode", 1, 3)
        tell("encode", 1, 3)
        tell("encode", 2, 3)
    assert [record.message for record in caplog.records] == ["Measuring curves: about 2 minutes left"]
    assert [spoken(value) for value in (31, 300, 7200)] == ["31 seconds", "5 minutes", "2 hours"]


def test_an_artifact_without_a_report(tmp_path: Path) -> None:
    done = octavo.compress(net(), ratio=3, data=[torch.randn(96, 64)], objective="squared", preset="fast")
    report = done.save(tmp_path / "alone", report=False)
    assert {path.name for path in (tmp_path / "alone").iterdir()} == {"model.safetensors", "octavo.json", "README.md"}
    assert report["quality"]["value"] > 0
    found = octavo.verify(tmp_path / "alone")
    assert found.weights_match is None and found.ratio >= 3
    octavo.load(tmp_path / "alone", into=net())
    done.save(tmp_path / "both")
    assert (tmp_path / "both" / "report.json").exists()
    assert (tmp_path / "both" / "octavo.json").read_bytes() == (tmp_path / "alone" / "octavo.json").read_bytes()
