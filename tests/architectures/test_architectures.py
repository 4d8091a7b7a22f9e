"""Every architecture of the zoo: compressed from its folder, saved, and loaded by its own class in a fresh process."""

import json
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import transformers

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import kinds  # noqa: E402
import making  # noqa: E402
import zoo  # noqa: E402


def made(row, folder):
    try:
        return {**making.compressed(row, folder), "name": row.name}
    except Exception:
        return {"error": traceback.format_exc(), "name": row.name}


def loaded(cases):
    """What a fresh process finds in the artifacts of the cases, in the same order."""
    command = [sys.executable, str(HERE / "fresh.py")]
    done = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def cases(request, tmp_path_factory):
    """By architecture what its report stated and what a fresh process found in its artifact.

    Rows that are not asked for are left out, so that one can be tried alone.
    """
    asked = {item.callspec.params["name"] for item in request.session.items if "cases" in item.fixturenames}
    rows, folder = [row for row in zoo.ZOO if row.name in asked], tmp_path_factory.mktemp("zoo")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    every = [made(row, folder / row.name) for row in rows]
    sound = [case for case in every if "error" not in case]
    found = loaded(sound)
    pairs = {case["name"]: {**case, "found": one} for case, one in zip(sound, found, strict=True)}
    return {case["name"]: pairs.get(case["name"], case) for case in every}


@pytest.mark.parametrize(
    "name",
    [pytest.param(row.name, marks=[pytest.mark.wide] * row.wide, id=f"{row.group}-{row.name}") for row in zoo.ZOO],
)
def test_what_is_stated_is_what_its_own_class_gives(name, cases):
    case = cases[name]
    assert "error" not in case, case["error"]
    found = case["found"]
    assert "error" not in found, found["error"]
    assert (found["missing"], found["unexpected"], found["mismatched"]) == ([], [], [])
    assert found["quality"] == pytest.approx(case["stated"], rel=1e-3, abs=1e-7)
    assert case["stated"] > 0
    assert found["generated"] == (1 if case["generates"] else None)
    row = next(row for row in zoo.ZOO if row.name == name)
    assert case["generates"] is (row.generates and not row.wide)
    assert case["objective"] in kinds.GROUPS[row.group].objectives


def test_the_zoo_is_wide_enough():
    assert len({row.name for row in zoo.ZOO}) == len(zoo.ZOO) >= 80
    assert len([row for row in zoo.ZOO if not row.wide]) >= 35
    assert len({row.group for row in zoo.ZOO if not row.wide}) == 9


@pytest.mark.parametrize("row", [row for row in zoo.ZOO if not row.wide], ids=lambda row: row.name)
def test_models_of_the_zoo_are_the_same_at_every_call(row):
    one, other = row.model().state_dict(), row.model().state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
