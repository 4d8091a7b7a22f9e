"""Other results laid over the curve, by the command that writes the page again."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from octavo.cli import app
from octavo.errors import RequestError
from octavo.report import Report, read_overlays


def test_a_report_gives_its_curve_and_its_measured_point(report: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps({"schema_version": 1, **report}))
    (overlay,) = read_overlays(tmp_path / "report.json")
    assert overlay.name == "all-MiniLM-L6-v2, 8.05×" and overlay.metric == "1 - cosine"
    assert overlay.line[0] == (45436224, 1.1e-5) and len(overlay.line) == 12
    assert overlay.marks == ((11288503, 0.0031),) and overlay.source == report["source"]["fingerprint"]


def test_points_of_one_name_are_one_series(tmp_path: Path) -> None:
    points = [("a", 9, 0.1), ("b", 5, 0.2), ("a", 7, 0.3)]
    (tmp_path / "peers.json").write_text(
        json.dumps([dict(zip(("name", "bytes", "loss"), p, strict=True)) for p in points])
    )
    found = {overlay.name: overlay.marks for overlay in read_overlays(tmp_path / "peers.json")}
    assert found == {"a": ((7, 0.3), (9, 0.1)), "b": ((5, 0.2),)}


@pytest.mark.parametrize(
    "text, said",
    [
        ("[{", "not a list of points: .*; give objects with name, bytes and loss, or a report.json"),
        ("[]", "it is empty"),
        ("5", "not a JSON object"),
        ("{}", "peers.json: not a report: title is missing"),
        ('[{"name": "a", "bytes": 5}]', r"\[0\].loss is missing"),
        ('[{"name": "a", "bytes": "5", "loss": 1}]', r"\[0\].bytes is \"5\"; an integer is needed"),
        ('[{"name": "a", "bytes": 0, "loss": 1}]', "has 0 bytes and loss 1; write both as measured"),
    ],
)
def test_what_is_neither_is_refused_by_its_first_wrong_value(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "peers.json").write_text(text)
    with pytest.raises(RequestError, match=said):
        read_overlays(tmp_path / "peers.json")


def test_the_command_lays_files_over_the_page_and_leaves_the_data(explored: Any, tmp_path: Path) -> None:
    (tmp_path / "peers.json").write_text('[{"name": "other tool", "bytes": 9000, "loss": 0.5}]')
    before = (explored.artifact / "report.json").read_bytes()
    over = ["--over", str(tmp_path / "peers.json"), "--over", str(explored.artifact / "report.json")]
    page = tmp_path / "page.html"
    words = ["report", str(explored.artifact), *over, "--out", str(page), "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    title = Report.from_json(json.loads(before)).title
    assert json.loads(result.stdout)["over"][0] == "other tool" and json.loads(result.stdout)["over"][1].startswith(
        title
    )
    assert '"name":"other tool"' in page.read_text(encoding="utf-8")
    assert (explored.artifact / "report.json").read_bytes() == before
    plainly = CliRunner().invoke(app, [*words[:-1], "--overwrite"])
    assert [line.partition(":")[0] for line in plainly.stdout.splitlines()] == ["Report", *["laid over"] * 2]
    # A page that is there is replaced on request alone, and a folder without a report is named.
    assert CliRunner().invoke(app, words).exit_code == 2
    assert CliRunner().invoke(app, [*words, "--overwrite"]).exit_code == 0
    assert CliRunner().invoke(app, ["report", str(tmp_path)]).exit_code == 2
