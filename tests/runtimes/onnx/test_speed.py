"""A latency as the budget: met by forms and kernels, measured from the file that was written."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import octavo
from octavo.cli import app
from octavo.forms import Dense, Grid, LowRank
from octavo.runtimes.onnx.latency import Table
from octavo.runtimes.onnx.sessions import Session
from octavo.targets.speed.asked import asked_for
from octavo.targets.speed.written import MODEL


def test_latencies_are_measured_once(tmp_path: Path) -> None:
    form = Grid(torch.ones(64, 96, dtype=torch.int8), torch.ones(64, 1))
    factors = LowRank(Dense(torch.ones(64, 8)), Dense(torch.ones(8, 96)))
    table = Table(4, threads=1, folder=tmp_path)
    taken = [table.seconds(form, "int8"), table.seconds(form, "float32"), table.seconds(factors, "float32")]
    assert all(0 < seconds < 1 for seconds in taken)
    table.save()
    again = Table(4, threads=1, folder=tmp_path)
    assert [again.seconds(form, "int8"), again.seconds(form, "float32")] == taken[:2]
    assert again.measured == 0
    # Values do not matter, shapes do.
    other = Grid(torch.zeros(64, 96, dtype=torch.int8), torch.ones(64, 1))
    assert again.seconds(other, "int8") == taken[0]
    again.seconds(Grid(torch.zeros(64, 95, dtype=torch.int8), torch.ones(64, 1)), "int8")
    assert again.measured == 1
    table.file.write_text("damaged")
    assert Table(4, threads=1, folder=tmp_path).entries == {}


def test_a_latency_is_met_and_measured_from_the_file(
    models: dict[str, Path], sentences: list[str], tmp_path: Path
) -> None:
    # Any machine runs so small a model in two seconds; which forms that takes is the machine's affair.
    (tmp_path / "texts.txt").write_text("\n".join(sentences))
    asked = octavo.Request(models["bert"], target="speed", shape="1x16", data=tmp_path / "texts.txt")
    octavo.profile(asked, tmp_path / "p")
    with pytest.raises(octavo.RequestError, match="run octavo compress with --profile"):
        octavo.plan(tmp_path / "p", speedup=2)
    # On the command line the profile brings its target, and with it the options that may stand beside it.
    words = ["compress", str(models["bert"]), "--profile", str(tmp_path / "p"), "--out", str(tmp_path / "out")]
    said = CliRunner().invoke(app, [*words, "--ratio", "3"])
    assert said.exit_code == 2 and "--for speed: these options cannot be combined with it: --ratio" in said.output
    assert "exactly one of speedup and latency" in CliRunner().invoke(app, words).output
    done = octavo.compress(asked.asked(latency="2s", workspace=tmp_path / "p", resume=True))
    report = done.save(tmp_path / "fast")
    speed = report["speed"]
    assert speed["met"]
    assert speed["seconds"] <= 2
    # Nothing has to be given up for that: all sites are as good as they can be stored.
    assert speed["divergence"]["mean"] < 1e-4
    assert Session(tmp_path / "fast" / MODEL).kernels == speed["sites"]
    assert octavo.verify(tmp_path / "fast").weights_match
    card = (tmp_path / "fast" / "README.md").read_text()
    assert "## Speed" in card
    assert "onnxruntime" in card
    page = (tmp_path / "fast" / "report.html").read_text()
    assert '<section id="speed">' in page and "torch bfloat16" in page
    assert json.loads((tmp_path / "fast" / "report.json").read_text())["speed"] == speed
    assert {"torch float32", "torch bfloat16", "onnxruntime float32"} <= set(speed["runtimes"])
    assert speed["runtimes"]["torch float32"]["seconds"] == speed["torch_seconds"]
    assert "Budget: latency 2000ms, in time of one call with onnxruntime" in card
    assert report.command == 'octavo.compress(source, latency="2000ms", target="speed").save(path)'
    assert {entry.name for entry in tmp_path.iterdir() if "lock" not in entry.name} == {"fast", "p", "texts.txt"}
    assert ">Speed<" in (tmp_path / "fast" / "report.html").read_text()


def test_what_is_kept_runs_as_it_is_kept(models: dict[str, Path], sentences: list[str], tmp_path: Path) -> None:
    keep = {"*_proj.weight": "float32", "*.mlp.*": "int8:smoothing=0.5", "*embed*": "int8:smoothing=0"}
    done = octavo.compress(models["llama"], target="speed", latency="2s", shape="1x16", data=sentences, keep=keep)
    kernels = done.save(tmp_path / "fast")["speed"]["sites"]
    assert {kernel for name, kernel in kernels.items() if ".mlp." in name} == {"int8"}
    assert {kernel for name, kernel in kernels.items() if ".self_attn." in name} == {"float32"}


def test_what_cannot_be_reached_names_what_can(models: dict[str, Path], tmp_path: Path, sentences: list[str]) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(sentences))
    words = ["compress", str(models["bert"]), "--for", "speed", "--speedup", "1e6", "--data", str(texts), "--out"]
    said = CliRunner().invoke(app, [*words, str(tmp_path / "fast"), "--shape", "1x16", "--json"])
    assert said.exit_code == 3, said.output
    assert 0 < json.loads(said.stdout)["limit"] < 1e6
    assert not (tmp_path / "fast").exists()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "exactly one of speedup and latency"),
        ({"speedup": 2.0, "latency": "5ms"}, "exactly one of speedup and latency"),
        ({"speedup": -1.0}, "not a positive finite number"),
        ({"latency": "soon"}, "write it like 5ms"),
        ({"speedup": 2.0, "shape": "many"}, "such as 1x32"),
        ({"speedup": 2.0, "ratio": 4}, "--for speed: these options cannot be combined with it: --ratio"),
        ({"target": "disk", "ratio": 4, "speedup": 2.0}, "cannot be combined with it: --speedup"),
    ],
)
def test_bad_requests_are_refused_at_once(request_: dict, message: str, models: dict[str, Path]) -> None:
    with pytest.raises(octavo.RequestError, match=message):
        octavo.compress(models["bert"], **{"target": "speed", **request_})


def test_times_are_read() -> None:
    assert asked_for(None, "5ms", "2x8").seconds == pytest.approx(0.005)
    assert asked_for(None, "300us", "2x8").allowed(1.0) == pytest.approx(3e-4)
    assert asked_for(None, 0.25, (2, 8)).shape == (2, 8)
    assert asked_for(4.0, None, "2x8").allowed(1.0) == pytest.approx(0.25)
