"""The headline, the console table and the model card."""

import io
from typing import Any

from rich.console import Console

from octavo import report as reports
from octavo.report import Report


def printed(data: dict[str, Any], width: int = 100) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(reports.table(Report.from_json(data)))
    return stream.getvalue()


def card(data: dict[str, Any]) -> str:
    return reports.card(Report.from_json(data))


def test_the_headline_says_it_in_one_sentence(report: dict[str, Any]) -> None:
    assert reports.headline(Report.from_json(report)) == "90.87 MB -> 11.29 MB, 8.05x smaller, 1 - cosine 0.0031"


def test_the_table_compares_before_after_and_uniform(report: dict[str, Any]) -> None:
    text = printed(report)
    for figure in ("90.87 MB", "11.29 MB", "11.30 MB", "8.05×", "8.04×", "3.98", "0.0031", "0.0042", "0.006"):
        assert figure in text
    assert "12.1 ms" in text
    assert "entropy (step=0.1)" in text
    assert "99.4 %" in text


def test_the_table_prints_names_as_they_are(report: dict[str, Any]) -> None:
    report["title"] = "[bold red]x[/] \x1b[31m"
    text = printed(report)
    assert "[bold red]x[/]" in text
    assert "\x1b" not in text


def test_the_table_says_what_was_not_measured(report: dict[str, Any]) -> None:
    del report["latency"], report["quality"]["p95"]
    report["quality"]["uniform"] = None
    assert printed(report).count("not measured") == 7


def test_the_card_contains_the_figures(report: dict[str, Any]) -> None:
    text = card(report)
    assert text.startswith("---\nlibrary_name: octavo\n")
    assert "# all-MiniLM-L6-v2, compressed" in text
    for figure in ("90.87 MB → 11.29 MB", "8.05x smaller", "0.0042", "22.7 million", "quantize (35 sites", "3.98"):
        assert figure in text
    assert f"```sh\n{report['command']}\n```" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {5}


def test_the_card_admits_that_one_setting_won(report: dict[str, Any]) -> None:
    report["winner"] = "uniform"
    report["quality"]["value"] = 0.0042
    assert "did not beat one setting for all, so every site has entropy (step=0.1): 1 - cosine 0.0042" in card(report)


def test_the_card_escapes_markdown_of_strangers(report: dict[str, Any]) -> None:
    report["title"] = "![x](y) <script>|a|\n# big"
    report["command"] = "octavo compress '```\n```' \\\n  --ratio 8"
    text = card(report)
    assert "# !\\[x\\](y) \\<script\\>\\|a\\|\\\\n# big, compressed" in text
    assert "````sh\noctavo compress '```\n```' \\\n  --ratio 8\n````" in text


def test_a_setting_that_won_stands_beside_both_of_its_figures(report: dict[str, Any]) -> None:
    report["winner"] = "uniform"
    said = "every site has entropy (step=0.1): 1 - cosine 0.0042 when they were compared, 0.0031 "
    assert f"{said}as it is stored." in card(report)
    report["sections"] = [{"name": "recovery", "title": "Recovery by distillation"}]
    assert f"{said}after recovery." in card(report)
    report["winner"] = "mixed"
    assert "1 - cosine 0.0031 after recovery, against 0.0042 with the best single setting" in card(report)


def test_one_setting_that_does_not_exist_everywhere_is_not_said_to_be(report: dict[str, Any]) -> None:
    report["winner"] = "uniform"
    report["uniform"] |= {"sites": 26, "of": 38, "moved": False}
    text = card(report)
    assert "so 26 of 38 sites have entropy (step=0.1); at the others it does not exist or saves nothing" in text
    assert "every site" not in text
    report["uniform"] |= {"sites": 38, "moved": True}
    assert "so every site has entropy (step=0.1), moved a little at some sites to use the budget" in card(report)


def test_the_verdict_says_what_the_best_single_setting_takes(report: dict[str, Any]) -> None:
    assert "against 0.0042 with the best single setting, entropy (step=0.1), which takes 11.30 MB." in card(report)
    report["uniform"]["held"] = 15_000_000
    assert "which takes 15.00 MB in memory." in card(report)
    report["uniform"], report["quality"]["uniform"] = None, None
    assert "no single setting for all was measured" in card(report)


def test_the_card_has_one_line_a_kind_of_warning(report: dict[str, Any]) -> None:
    names = [site["name"] for site in report["sites"]]
    report["calibration"]["warnings"] = [f"{name}: little data ({n} for 384)" for n, name in enumerate(names)]
    text = card(report)
    assert text.count("Warning:") == 1 and f"{len(names)} sites: little data, e.g. " in text


def test_a_budget_that_is_no_size_is_not_told_as_one(report: dict[str, Any]) -> None:
    report["budget"] |= {"asked": "speedup 1.3", "unit": "time of one call"}
    text = card(report)
    assert "Budget: speedup 1.3, in time of one call; the artifact takes 11.36 MB." in text
    assert "of which" not in text


def test_a_cut_alone_says_what_is_left_and_what_was_asked(report: dict[str, Any]) -> None:
    report |= {"sites": [], "uniform": None}
    assert "Nothing was compressed: all is stored as it was given." in card(report)
    levels = [{"share": 0.5, "weights": 163_584, "alone": 1.88, "gone": {"neuron": [426, 768]}}]
    report["cut"] = {"name": "structured", "source": "a paper", "total": 699_264, "levels": levels, "kept": 0.5}
    report["sections"] = [{"name": "cut", "title": "Cut"}]
    text = card(report)
    assert "structured removed 163,584 of 699,264 weights; the 535,680 that are left are stored as they are." in text
    assert "Budget: ratio 8, at most 11.36 MB, of which 99.4 % is used." in text and "Nothing was" not in text


def test_weights_of_another_runtime_are_said_to_be_measured_before(report: dict[str, Any]) -> None:
    report["quality"]["became"] = "model.gguf"
    assert "The weights were measured before they became model.gguf." in card(report)


def test_the_card_says_how_latencies_were_measured(report: dict[str, Any]) -> None:
    assert "Latency and load time: median of 9 interleaved pairs." in card(report)
