"""The report as a record: JSON and back, what is refused of a stranger's file, and sections of a target."""

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from octavo.encoding.section import Section
from octavo.errors import ArtifactError
from octavo.report import Report, card, told

SPEED = Section(
    "speed",
    "Speed",
    "model.onnx is 2.50 times as fast",
    ("Runs with", "Milliseconds"),
    (("torch <float32>", 12.345), ("onnxruntime", None), ("sites", 1234)),
    ("slower than asked for",),
    {"speedup": 2.5, "shape": [1, 32]},
)


@pytest.fixture
def made(report: dict[str, Any]) -> Report:
    return replace(Report.from_json(report), sections=(SPEED,))


def test_json_and_back_is_the_same_report(made: Report) -> None:
    facts = json.loads(json.dumps(made.to_json(), allow_nan=False))
    assert next(iter(facts)) == "schema_version" and facts["schema_version"] == 1
    again = Report.from_json(facts)
    assert again.to_json() == made.to_json()
    assert again.sections[0].figures == SPEED.figures


def test_a_report_reads_by_the_keys_of_its_json(made: Report) -> None:
    facts = made.to_json()
    assert all(made[key] == value for key, value in facts.items() if key != "sections")
    assert made["speed"] == facts["speed"] == {"speedup": 2.5, "shape": [1, 32]}
    with pytest.raises(KeyError):
        made["colour"]


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("quality", "value"), "0.1", r'quality\.value is "0\.1"; null or a number|quality\.value is "0\.1"; a number'),
        (("quality", "value"), 10**400, r"quality\.value is 1000"),
        (("quality", "lower_is_better"), 1, r"quality\.lower_is_better is 1; true or false is needed"),
        (("artifact", "bytes"), 1.5, r"artifact\.bytes is 1\.5; an integer is needed"),
        (("artifact", "files"), [1], r"artifact\.files is a list; an object is needed"),
        (("artifact", "files"), {"a" * 100: None}, r"artifact\.files\['a{40}'\] is null; an integer is needed"),
        (("sites",), {}, r"sites is an object; a list is needed"),
        (("sites",), [3], r"sites\[0\] is 3; an object is needed"),
        (("title",), True, r"title is true; a text is needed"),
        (("unused",), {"prune": {"sites": 1, "larger": 0, "exact": 0, "times": [1]}}, r"times is a list; a list of 2"),
        (("schema_version",), 2, r"schema_version is 2, this version reads 1"),
        (("sections",), [{"name": "<b>", "title": ""}], r"sections\[0\]: section '<b>': the name must be"),
        (("sections",), [{"name": "sites", "title": ""}], r"needs a name that nothing else in the report has"),
        (("sections",), [{"name": "a", "title": "", "rows": [[1]]}], r"every row needs 0 cells"),
    ],
)
def test_the_first_value_that_is_wrong_is_named(report: dict[str, Any], place: Any, value: Any, says: str) -> None:
    part = report
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    with pytest.raises(ArtifactError, match=f"^found.json: not a report: .*({says})"):
        Report.from_json(report, "found.json")


def test_what_is_missing_is_named_and_what_is_unknown_ignored(report: dict[str, Any]) -> None:
    assert Report.from_json({**report, "colour": "red"}) == Report.from_json(report)
    del report["source"]["bytes"]
    with pytest.raises(ArtifactError, match=r"source\.bytes is missing"):
        Report.from_json(report)
    for other in (None, [], "x"):
        with pytest.raises(ArtifactError, match="an object is needed"):
            Report.from_json(other)


def test_card_and_terminal_show_the_sections(made: Report) -> None:
    text = card(made)
    assert "\n## Speed\n\nmodel.onnx is 2.50 times as fast\n" in text
    assert "| Runs with | Milliseconds |\n| --- | --- |\n| torch \\<float32\\> | 12.3 |\n" in text
    assert "| onnxruntime | not measured |\n| sites | 1,234 |\n\n- Note: slower than asked for\n" in text
    stream = io.StringIO()
    for part in told(made):
        Console(file=stream, width=100, color_system=None).print(part)
    for phrase in ("Speed: model.onnx is 2.50 times as fast", "12.3", "note: slower than asked for"):
        assert phrase in stream.getvalue()
