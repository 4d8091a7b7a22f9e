"""The page as a browser reads it, and the files on disk."""

import copy
import json
import os
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import octavo
from octavo.encoding.section import Section
from octavo.errors import MissingExtraError, OctavoError, RequestError
from octavo.report import Report, write
from octavo.report.alternatives import unused

SECTIONS = [
    "outcome",
    "tradeoff",
    "spread",
    "families",
    "lengths",
    "worst",
    "sites",
    "kept",
    "calibration",
    "effort",
    "reproduction",
]
HOSTILE = "<script>alert(1)</script>\"'&\x1b[31m\u202e\udc80\n.weight"
VOID = {"meta", "wbr", "link", "img", "br", "hr", "input"}


class Reader(HTMLParser):
    """Reads the page as a browser would, and fails where tags do not match."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.section = "header"
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = dict(attrs)["id"] or ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts[self.section] = self.texts.get(self.section, "") + data


def read(data: dict[str, Any], folder: Path) -> Reader:
    write(Report.from_json(data), folder / "report.html")
    return Reader((folder / "report.html").read_text(encoding="utf-8"))


def poison(value: Any) -> Any:
    """Put markup into every string and every key that is not one of the schema."""
    if isinstance(value, dict):
        named = {"files", "setting", "families", "unused", "coding", "timings", "dtypes", "environment"}
        return {
            key: {f"{HOSTILE}{k}": poison(v) for k, v in item.items()}
            if key in named and isinstance(item, dict)
            else poison(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [poison(item) for item in value]
    return HOSTILE + value if isinstance(value, str) else value


def test_the_page_has_every_section_in_order_and_says_what_was_measured(report: dict[str, Any], tmp_path: Path) -> None:
    page = read(report, tmp_path)
    assert [attrs["id"] for tag, attrs in page.tags if tag == "section"] == SECTIONS
    assert "90.87 MB → 11.29 MB, 8.05×\xa0smaller, 1 - cosine 0.0031" in page.texts["header"]
    expected = {
        "outcome": ["11.30 MB", "0.0042", "12.3 ms", "55 ms", "model.safetensors", "ratio 8", "99.4 %"],
        "tradeoff": ["gptq everywhere", "this artifact, measured", "bits=4 group=64"],
        "spread": ["encoder.layer.*.output.dense.weight", "×\xa06", "5.29 MB"],
        "families": [
            "quantize",
            "35",
            "factorize",
            "prune was tried at 36 sites and won none",
            "in the bytes that 31 of these were given its best would lose at least 1.2 times",
            "median 3.4",
            "it has no setting in the bytes that 4 of these were given",
            "what was chosen loses nothing in the bytes that 1 of these was given",
            "share was tried at 2 sites and won none: it has no setting in the bytes that these were given.",
        ],
        "lengths": ["22.4 million", "huffman", "11.00 MB"],
        "worst": ["embeddings.word_embeddings.weight", "0.00071"],
        "sites": ["encoder.layer.5.attention.self.key.weight", "rank=96, bits=6", "38 sites"],
        "kept": ["1-d tensor: stored as float16 – 12 tensors", "13 tensors"],
        "calibration": ["256 sequences, 6,100 tokens", "general English"],
        "effort": ["40 s", "1.20 GB", "encode"],
        "reproduction": [report["command"], report["source"]["fingerprint"], "2.13.0+cpu"],
    }
    for section, phrases in expected.items():
        missing = [phrase for phrase in phrases if phrase not in page.texts[section]]
        assert not missing, section


def test_a_family_is_not_said_to_be_larger_where_nothing_is_lost() -> None:
    """Nothing that stands before a layer of zeros costs anything, whatever is stored of it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 8))
    nn.init.zeros_(net[2].weight)
    done = octavo.compress(net, ratio=4, data=[torch.randn(64, 24)], methods=["entropy", "mpo"])
    assert not any(point.loss for point in done.built.plan.points.values())
    found = unused(done)["factorize"]
    assert found.times is None and found.exact > 0
    assert found.exact + found.larger == found.sites


def test_the_worst_sites_are_the_ten_of_highest_loss(report: dict[str, Any], tmp_path: Path) -> None:
    page = read(report, tmp_path)
    ordered = sorted(report["sites"], key=lambda site: -site["expected_loss"])
    places = [page.texts["worst"].find(site["name"]) for site in ordered]
    assert -1 not in places[:10]
    assert places[:10] == sorted(places[:10])
    assert set(places[10:]) == {-1}


def test_the_page_loads_nothing(report: dict[str, Any], tmp_path: Path) -> None:
    page = read(report, tmp_path)
    for tag, attrs in page.tags:
        assert tag not in {"script", "link", "img", "iframe", "object", "style-sheet"}
        for name, value in attrs.items():
            if name in {"src", "href", "xlink:href", "data", "srcset", "action"}:
                assert value is not None
                assert value.startswith("#")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\((?!#)", text)


def test_references_inside_the_pictures_are_unique_and_resolve(report: dict[str, Any], tmp_path: Path) -> None:
    page = read(report, tmp_path)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)) != set()
    assert {a or b for a, b in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)} <= set(ids)
    # Colours of the drawing must all have become variables, or dark mode would hide them.
    assert "#0a0b" not in text
    assert "var(--accent)" in text


def test_markup_in_strings_stays_text(report: dict[str, Any], tmp_path: Path) -> None:
    clean = read(report, tmp_path / "clean")
    page = read(poison(report), tmp_path / "poisoned")
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in clean.tags} | {"small"}
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
    for section in ["header", *SECTIONS]:
        assert "alert(1)" in page.texts[section], section
    text = (tmp_path / "poisoned" / "report.html").read_text(encoding="utf-8")
    assert not re.search("[\x1b\u202e\ud800-\udfff]", text)


def test_the_json_beside_equals_the_data(report: dict[str, Any], tmp_path: Path) -> None:
    read(report, tmp_path)
    facts = json.loads((tmp_path / "report.json").read_text())
    assert facts["schema_version"] == 1 and Report.from_json(facts) == Report.from_json(report)
    for key, value in report.items():
        assert facts[key] == value or isinstance(value, dict), key
        assert not isinstance(value, dict) or facts[key].items() >= value.items(), key
    assert sorted(os.listdir(tmp_path)) == ["report.html", "report.json"]


def test_numbers_that_are_not_finite_become_null(report: dict[str, Any], tmp_path: Path) -> None:
    made = Report.from_json(report)
    sites = [replace(site, expected_loss=float("nan")) if n == 3 else site for n, site in enumerate(made.sites)]
    made = replace(made, sites=tuple(sites), quality=replace(made.quality, value=float("inf")))
    write(made, tmp_path / "report.html")
    page = Reader((tmp_path / "report.html").read_text(encoding="utf-8"))
    facts = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert facts["sites"][3]["expected_loss"] is None
    assert "quality not measured" in page.texts["header"]


def test_what_was_not_measured_is_said(report: dict[str, Any], tmp_path: Path) -> None:
    del report["latency"], report["quality"]["p95"]
    report["quality"]["uniform"] = report["uniform"]["quality"] = report["peak_memory"] = None
    report["timings"]["total"] = None
    page = read(report, tmp_path)
    assert page.texts["outcome"].count("not measured") >= 6
    assert "Latency and load time: not measured in this run" in page.texts["outcome"]
    assert "Total time: not measured. Peak memory: not measured." in page.texts["effort"]


def test_an_empty_report_still_has_every_section(report: dict[str, Any], tmp_path: Path) -> None:
    report["sites"], report["kept"], report["families"], report["coding"] = [], [], {}, {}
    report["curve"] |= {"points": [], "uniform": []}
    report["code_lengths"] = {"bins": [], "weights": []}
    report["calibration"]["warnings"], report["timings"] = [], {}
    page = read(report, tmp_path)
    assert [attrs["id"] for tag, attrs in page.tags if tag == "section"] == SECTIONS
    assert "No site was compressed." in page.texts["spread"]
    assert "Everything was compressed." in page.texts["kept"]


def test_lossless_points_and_higher_is_better_are_drawn(report: dict[str, Any], tmp_path: Path) -> None:
    report["curve"]["points"][0] |= {"expected": 0.0, "measured": -1e-9}
    assert "this artifact, measured" in read(report, tmp_path).texts["tradeoff"]
    report["quality"] |= {"lower_is_better": False, "metric": "accuracy", "value": 0.91, "uniform": 0.9}
    report["curve"]["chosen"]["quality"] = 0.91
    page = read(report, tmp_path)
    assert "higher is better" in page.texts["outcome"]
    assert "expected loss, log scale" in page.texts["tradeoff"]
    assert "accuracy" in page.texts["tradeoff"]


def test_five_thousand_sites_stay_small_and_say_what_is_left_out(many: dict[str, Any], tmp_path: Path) -> None:
    assert len(many["sites"]) > 5000
    many = copy.deepcopy(many)
    for number, site in enumerate(many["sites"]):
        site["name"] += f"_{'x' * 300}{number}"
    many["kept"] += [t | {"reason": f"reason {n}: {'y' * 300}"} for n, t in enumerate(many["kept"] * 4)]
    page = read(many, tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 1_000_000
    left_out = len(many["sites"]) - 400
    assert f"{left_out:,} are left out here, and the JSON file has all of them" in page.texts["sites"]
    assert "the rest: 5,017 sites" in page.texts["spread"]
    assert len(json.loads((tmp_path / "report.json").read_text())["sites"]) == len(many["sites"])


def test_without_matplotlib_the_extra_is_named_and_nothing_written(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'octavo[report]'")):
        write(Report.from_json(report), tmp_path / "report.html")
    assert os.listdir(tmp_path) == []


def test_a_page_cannot_take_the_place_of_its_json(report: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"report\.json"):
        write(Report.from_json(report), tmp_path / "report.json")
    assert os.listdir(tmp_path) == []


def test_a_failed_write_leaves_the_old_page(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "report.html"
    target.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OctavoError, match="cannot be written: disk full"):
        write(Report.from_json(report), target)
    assert os.listdir(tmp_path) == ["report.html"]
    assert target.read_text() == "old"


def test_a_section_of_the_target_follows_the_outcome(report: dict[str, Any], tmp_path: Path) -> None:
    rows = ((HOSTILE, 12.345), ("onnxruntime", None))
    section = Section("speed", "Speed", HOSTILE, ("Runs with", "Milliseconds"), rows, (HOSTILE,), {"speedup": 2.5})
    write(replace(Report.from_json(report), sections=(section,)), tmp_path / "report.html")
    page = Reader((tmp_path / "report.html").read_text(encoding="utf-8"))
    names = [attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert names == ["outcome", "speed", *SECTIONS[1:]]
    assert page.texts["speed"].count("alert(1)") == 3 and "12.3" in page.texts["speed"]
    assert json.loads((tmp_path / "report.json").read_text())["speed"] == {"speedup": 2.5}
