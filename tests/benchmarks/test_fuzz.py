"""The fuzzer: a short run of it, and that it sees what it is there to see."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import octavo
from octavo.errors import ArtifactError
from octavo.forms import form_names

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


def test_mutants_of_every_kind_are_refused_or_restored(tmp_path: Path) -> None:
    words = [sys.executable, str(BENCHMARKS / "fuzz.py"), "--mutants", "150", "--workers", "1", "--keep", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(octavo.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert re.search(r"^150 mutants in \d+ s: \d+ refused, ", done.stdout, re.MULTILINE), done.stdout[-2000:]
    mutations = importlib.import_module("fuzzing.run").MUTATIONS
    missing = [name for name in mutations if not re.search(rf"^{re.escape(name)} +\d", done.stdout, re.MULTILINE)]
    assert len(missing) < len(mutations) // 10, missing


def test_every_registered_form_has_a_seed() -> None:
    gallery = importlib.import_module("fuzzing.gallery")
    assert sorted(gallery.MAKERS) == form_names()


def hang() -> None:
    while True:
        pass


def swell() -> None:
    np.ones(40_000_000).sum()


def ask() -> None:
    np.empty(1 << 40)


def fail() -> None:
    raise KeyError("x")


def refuse() -> None:
    raise ArtifactError("damaged")


def run_code() -> None:
    Path("ran-code").touch()


PLANTED = {
    os.abort: "crash", hang: "timeout", swell: "memory", ask: "memory", fail: "raw", refuse: "refused", run_code: "crash",
}  # fmt: skip


def test_failures_are_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cell, run, seeds, views = (importlib.import_module(f"fuzzing.{name}") for name in ("cell", "run", "seeds", "views"))
    monkeypatch.setattr(cell, "PROCESSOR", 4)
    honest, kind = views.Honest({}, {}), run.MUTATIONS["nothing"]

    def view(planted: Callable[[], Any]) -> Callable[..., Any]:
        def attempt(folder: Path, honest: Any) -> Any:
            planted()
            return views.Outcome("same")

        return attempt

    made = []
    for number, planted in enumerate(PLANTED):
        monkeypatch.setitem(views.VIEWS, planted.__name__, view(planted))
        seed = seeds.Seed(planted.__name__, tmp_path)
        made.append(run.Mutant(number, seed, kind, (planted.__name__,), tmp_path / str(number), 100))
        made[-1].folder.mkdir(parents=True)
    tally = run.Tally()
    for one, found in zip(made, cell.load([cell.Case(one.folder, one.views, honest) for one in made]), strict=True):
        run.judge(tally, one, found, tmp_path / "kept")
    assert {name: verdict for name, _, verdict in tally.counts} == {f.__name__: v for f, v in PLANTED.items()}
    assert len(list((tmp_path / "kept").iterdir())) == sum(verdict in run.FAILURES for verdict in PLANTED.values())


def test_a_change_that_nothing_signs_is_silent(tmp_path: Path) -> None:
    run, seeds, views = (importlib.import_module(f"fuzzing.{name}") for name in ("run", "seeds", "views"))
    folder = tmp_path / "mutant"
    folder.mkdir()
    found = run.Load({"state": views.Outcome("changed", "layer.0.weight")})
    for name, verdict in (("blob: field", "changed"), ("damage: manifest", "silent"), ("config: tree", "silent")):
        tally = run.Tally()
        one = run.Mutant(0, seeds.Seed("seed", tmp_path), run.MUTATIONS[name], ("state",), tmp_path, 100)
        run.judge(tally, one, found, tmp_path / "kept")
        assert list(tally.counts) == [("seed", name, verdict)]
