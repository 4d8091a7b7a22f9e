"""The plans that the page carries: those of ``octavo plan``, in few bytes, with the command that carries one out."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import octavo
from octavo.allocation.profiles import Curve, Point, Profile
from octavo.cli import app
from octavo.errors import ArtifactError
from octavo.report import Report, write_page
from octavo.report.repeated_call import pieces
from octavo.report.sites import BARS
from octavo.report.stop_plans import DETAILED, explorer_of
from octavo.report.stops import Explorer
from octavo.targets import get_target


def embedded(page: Path) -> dict[str, Any]:
    """The data that the page's script reads."""
    found = re.search(r'id="explorer-data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def saved(artifact: Path) -> Report:
    return Report.from_json(json.loads((artifact / "report.json").read_text()))


def test_every_stop_is_the_plan_that_octavo_plan_solves(explored: Any) -> None:
    data = embedded(explored.artifact / "report.html")
    profile = Profile.load(explored.profile / "profile.json")
    names = [row["name"] for row in data["rows"]]
    assert sorted(names) == sorted(curve.site for curve in profile.curves)
    assert len(data["stops"]) >= 60 and data["stops"][data["start"]]["ratio"] == 6
    for stop in data["stops"][::9]:
        plan = octavo.plan(explored.profile, ratio=stop["ratio"])
        assert (stop["budget"], stop["bytes"], stop["expected"]) == (plan.budget.bytes, plan.bytes, plan.expected)
        assert len(stop["cells"]) == len(names)
        for row, method, _, sites, size, loss in stop["cells"]:
            point = plan.points[names[row]]
            assert (data["methods"][method], sites, size) == (point.method, 1, point.bytes)
            curve = next(curve for curve in profile.curves if curve.site == names[row])
            assert loss == pytest.approx(profile.corrected(curve, point.loss), rel=1e-3)
        assert data["fixed"] + sum(cell[4] for cell in stop["cells"]) == plan.bytes


def test_the_stops_reach_from_one_end_of_the_profile_to_the_other(explored: Any) -> None:
    stops = saved(explored.artifact).explorer.stops
    profile = Profile.load(explored.profile / "profile.json")
    ratios = [stop.ratio for stop in stops]
    assert ratios == sorted(set(ratios)) and all(float(f"{ratio:.3g}") == ratio for ratio in ratios)
    assert 0.99 * profile.original_bytes / profile.smallest < ratios[-1] <= profile.original_bytes / profile.smallest
    # At the other end more bytes would not lower the loss, and just after it they do.
    finer = octavo.plan(explored.profile, ratio=0.9 * ratios[0])
    assert finer.expected == pytest.approx(stops[0].expected, rel=1e-3) and stops[1].expected > stops[0].expected


def test_the_command_of_a_stop_is_one_that_works(explored: Any, tmp_path: Path) -> None:
    found = saved(explored.artifact).explorer
    words = shlex.split("9.1".join(found.command))
    assert words[words.index("--out") + 1] == f"{explored.artifact}-9.1" and "--overwrite" not in words
    words[words.index("--out") + 1] = str(tmp_path / "again")
    result = CliRunner().invoke(app, words[1:])
    assert result.exit_code == 0, result.output
    assert octavo.Artifact(tmp_path / "again").bytes <= int(
        embedded(explored.artifact / "report.html")["original"] / 9.1
    )


@pytest.mark.parametrize(
    "command, shown",
    [
        ("octavo compress m --ratio 8 --out d", "octavo compress m --ratio R --out d-R"),
        ("octavo compress m --out 'my dir/' --size=11MB --resume", "octavo compress m --out 'my dir-R' --ratio R"),
        ("octavo compress m -o d --bits 3.5 --for memory", "octavo compress m -o d-R --ratio R --for memory"),
        ("octavo compress m -od", "octavo compress m -o d-R --ratio R"),
        ("octavo.save(trained, path, size='11MB')", "octavo.save(trained, path, ratio=R)"),
        ("octavo.save(trained, path)", "octavo.compress(source, ratio=R).save(path)"),
        ("pytest -q 'unfinished", "octavo.compress(source, ratio=R).save(path)"),
    ],
)
def test_another_ratio_is_put_into_the_recorded_command(command: str, shown: str) -> None:
    assert "R".join(pieces(command, "octavo.compress(source, bits=3.5).save(path)")) == shown


def test_what_has_no_other_plans_says_so(explored: Any, tmp_path: Path) -> None:
    speed = explorer_of(explored.done, get_target("speed").plans, "", "")
    assert not speed.stops and "its plans are measured on the model" in speed.why
    octavo.plan(explored.profile, ratio=6).save(tmp_path / "plan.yaml")
    report = octavo.compress(explored.source, plan=tmp_path / "plan.yaml", progress=False).save(tmp_path / "out")
    assert not report.explorer.stops and "A plan was carried out" in report.explorer.why
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "There is no slider here. A plan was carried out" in page and "<script" not in page


def test_a_run_around_one_size_says_that_its_curves_end(tmp_path: Path) -> None:
    net = torch.nn.Linear(64, 64)
    report = octavo.compress(net, ratio=6, preset="fast", methods=["rtn", "entropy"], progress=False).save(
        tmp_path / "a"
    )
    assert any("octavo profile measures all sizes" in note for note in report.explorer.notes)


def test_many_sites_are_told_by_their_roles(explored: Any) -> None:
    profile = Profile.load(explored.profile / "profile.json")
    curves = [
        Curve(
            f"layer.{layer}.part{part}.weight",
            "linear",
            (64, 64),
            [Point("rtn", {"bits": bits}, 512 * bits, 0.5**bits) for bits in (2, 4, 8)],
        )
        for layer in range(DETAILED // 20 + 1)
        for part in range(20)
    ]
    profile = replace(profile, curves=curves, original_bytes=4 * 64 * 64 * len(curves))
    done = replace(explored.done, profile=profile)
    found = explorer_of(done, get_target("disk").plans, "", "octavo.compress(source, ratio=6).save(path)")
    assert len(found.rows) == len(found.bars) == 20 <= BARS
    assert all(row.sites == DETAILED // 20 + 1 for row in found.rows)
    for stop in found.stops:
        assert sum(cell[3] for cell in stop.cells) == len(curves)
        assert found.fixed + sum(cell[4] for cell in stop.cells) == stop.bytes


def test_names_in_the_data_stay_data(explored: Any, tmp_path: Path) -> None:
    data = json.loads((explored.artifact / "report.json").read_text())
    hostile = "</script><script>alert(1)</script>\u202e\x1b\udc80"
    data["explorer"]["rows"][0]["name"] = data["explorer"]["methods"][0] = data["explorer"]["command"][0] = hostile
    write_page(Report.from_json(data), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("<script") == 2 == text.count("</script>") and not re.search("[\x1b\u202e\ud800-\udfff]", text)
    assert embedded(tmp_path / "page.html")["rows"][0]["name"].startswith("</script><script>alert(1)")


def test_a_report_whose_plans_name_what_is_not_there_is_refused(explored: Any) -> None:
    data = json.loads((explored.artifact / "report.json").read_text())
    data["explorer"]["stops"][3]["cells"][0][1] = 99
    with pytest.raises(ArtifactError, match=r"explorer: the stop at ratio .* names a row, method or setting"):
        Report.from_json(data)


def test_a_page_of_the_most_sites_stays_small(report: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"name": f"model.layers.{n}.self_attn.q_proj.weight", "sites": 1, "bar": 0} for n in range(DETAILED)]
    stops = [
        {
            "ratio": 2 + n / 10,
            "budget": 10**8,
            "bytes": 10**8 - n,
            "expected": 0.0123456789,
            "cells": [[row, 0, n * DETAILED + row, 1, 12345678, 1.234e-5] for row in range(DETAILED)],
        }
        for n in range(61)
    ]
    settings = [f"step={n / 1e6:.3e}" for n in range(61 * DETAILED)]
    report["explorer"] = {
        "command": ["octavo compress m --ratio ", ""], "methods": ["entropy"], "settings": settings,
        "bars": ["model.layers.*.self_attn.q_proj.weight"], "rows": rows, "stops": stops,
    }  # fmt: skip
    write_page(Report.from_json(report), tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 2_000_000


def test_an_older_report_has_no_slider(report: dict[str, Any], tmp_path: Path) -> None:
    made = Report.from_json(report)
    assert made.explorer == Explorer()
    write_page(made, tmp_path / "page.html")
    assert "Explore other sizes" not in (tmp_path / "page.html").read_text(encoding="utf-8")
