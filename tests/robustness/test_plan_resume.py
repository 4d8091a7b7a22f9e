"""A run that carries a plan out and was killed continues, and writes what an uninterrupted one writes."""

import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import octavo

COUNTED = ("model.safetensors", "octavo.json")

#: By stage, what the workspace holds as soon as it is reached, and what it does not hold yet.
STAGES: dict[str, Callable[[Path], bool]] = {
    "evidence": lambda work: (work / "job.json").is_file(),
    "profile": lambda work: (work / "calibration.json").is_file(),
    "encode": lambda work: (work / "profile.json").is_file(),
    "save": lambda work: bool(list(work.parent.glob(".out.octavo-new.*"))),
}


@pytest.fixture(scope="module")
def planned(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, dict[str, bytes]]:
    """A model, its texts, a plan for it, and what the plan gives when nothing is killed."""
    folder = tmp_path_factory.mktemp("planned")
    source, texts = lab.write_bert(folder / "bert"), lab.write_texts(folder / "texts.txt", 320)
    octavo.profile(source, folder / "measured", data=texts, preset="fast")
    octavo.plan(folder / "measured", ratio=4).save(folder / "plan.yaml")
    octavo.compress(source, plan=folder / "plan.yaml", data=texts).save(folder / "whole")
    whole = {name: (folder / "whole" / name).read_bytes() for name in COUNTED}
    return source, texts, folder / "plan.yaml", whole


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_of_a_plan_continues(lab: Any, command: Any, planned: Any, tmp_path: Path, stage: str) -> None:
    source, texts, plan, whole = planned
    out, work = tmp_path / "out", tmp_path / ".out.octavo-work"
    words = ("compress", source, "--plan", plan, "--data", texts, "--out", out)
    for _ in range(4):
        process = subprocess.Popen(
            lab.arguments(*words), env=lab.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while process.poll() is None and not STAGES[stage](work) and time.monotonic() < deadline:
            time.sleep(0.001)
        process.kill()
        process.wait()
        if not out.exists():
            break
        # Killed too late: other work kept this process from looking in time.
        shutil.rmtree(out)
    assert not out.exists() and work.is_dir(), "killed too late"
    result = command(*words, "--resume")
    assert result.code == 0, result.err
    assert {name: (out / name).read_bytes() for name in COUNTED} == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_finished_profile_at_the_same_place_is_used(command: Any, lab: Any, bare: Path, tmp_path: Path) -> None:
    """Work of an ordinary run serves a plan of the same request; another plan goes on with the evidence of the first."""
    work = tmp_path / ".out.octavo-work"
    octavo.profile(bare, work, preset="fast")
    before = (work / "profile.json").read_bytes()
    octavo.plan(work, ratio=5).save(tmp_path / "plan.yaml")
    octavo.compress(bare, plan=tmp_path / "plan.yaml", preset="fast", workspace=work, resume=True)
    assert (work / "profile.json").read_bytes() == before
    words = ("compress", bare, "--plan", tmp_path / "plan.yaml", "--preset", "fast", "--out", tmp_path / "out")
    assert command(*words, "--resume").code == 0


def test_old_work_does_not_make_a_plan_measure_everything(bare: Path, tmp_path: Path) -> None:
    """Without resume what lies in the folder is removed, and says nothing of what has to be measured."""
    octavo.profile(bare, tmp_path / "work", preset="fast")
    octavo.plan(tmp_path / "work", ratio=5).save(tmp_path / "plan.yaml")
    done = octavo.compress(bare, plan=tmp_path / "plan.yaml", preset="fast", workspace=tmp_path / "work")
    assert [method.name for method in done.opened.methods] == ["keep"]
