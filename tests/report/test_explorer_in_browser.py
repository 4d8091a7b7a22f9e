"""The slider in a real browser: what it shows at several stops is what ``octavo plan`` solves there."""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import octavo
from octavo.report import Report, write_page
from octavo.report.overlays import Overlay
from octavo.report.text import figures, percent, size

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install 'octavo[test]'"
    )
    if CHROMIUM is None:
        pytest.skip("there is no chromium to drive: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        # As root, chromium starts only without its sandbox.
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield started
        started.close()


@pytest.fixture
def opened(browser: Any, explored: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The artifact's page; it fails on what the browser complains of, and on any request to the network."""
    context = browser.new_context(viewport=getattr(request, "param", DESK), offline=True)
    page, complaints = context.new_page(), []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda asked: asked.url.startswith("file:") or complaints.append(asked.url))
    page.goto((explored.artifact / "report.html").as_uri())
    yield page
    assert complaints == []
    context.close()


def value(page: Any, name: str) -> str:
    return page.locator(f"#explorer-{name}").get_attribute("value")


def shown(page: Any, name: str) -> str:
    return page.locator(f"#explorer-{name}").inner_text()


def bars(page: Any, name: str) -> dict[str, list[str]]:
    """The figures beside the bars, by the name of their row."""
    rows = page.locator(f"#explorer-{name} .row:not(.heads)").evaluate_all(
        "rows => rows.map(row => [row.querySelector('.name').textContent,"
        " [...row.querySelectorAll('.figure')].map(each => each.textContent)])"
    )
    return dict(rows)


def test_every_number_is_that_of_octavo_plan(opened: Any, explored: Any) -> None:
    slider = opened.locator("#explorer-ratio")
    assert (slider.get_attribute("min"), shown(opened, "shown")) == ("0", "6×")
    opened.locator("#explorer-every summary").click()
    last = int(slider.get_attribute("max"))
    for stop in (0, 7, 23, 41, last):
        slider.fill(str(stop))
        ratio = float(shown(opened, "shown").removesuffix("×"))
        plan = octavo.plan(explored.profile, ratio=ratio)
        # The exact values, and as they are read.
        assert int(value(opened, "bytes")) == plan.bytes and int(value(opened, "budget")) == plan.budget.bytes
        assert float(value(opened, "loss")) == plan.expected
        assert shown(opened, "loss") == figures(plan.expected) and shown(opened, "bytes") == size(plan.bytes)
        assert shown(opened, "used") == f"{percent(plan.bytes, plan.budget.bytes)} used"
        words = shown(opened, "command")
        assert f"--ratio {ratio:g} " in words and words.endswith(f"--out {explored.artifact}-{ratio:g}")
        by_method, by_role, number = Counter[str](), Counter[str](), Counter[str]()
        for site, point in plan.points.items():
            by_method[point.method] += point.bytes
            number[point.method] += 1
            by_role[re.sub(r"\d+", "*", site)] += point.bytes
        drawn = bars(opened, "methods")
        for method, nbytes in by_method.items():
            name = f"{method} {number[method]} site{'s' if number[method] > 1 else ''}"
            assert drawn.pop(name)[0] == f"{size(nbytes)} · {percent(nbytes, plan.bytes)}"
        assert drawn.pop("the rest what is not a site")[0].startswith(f"{size(plan.fixed_bytes)} · ")
        assert all(name.endswith(" 0 sites") for name in drawn)
        drawn = bars(opened, "sites")
        whole = sum(by_role.values())
        assert {name: figure[0] for name, figure in drawn.items()} == {
            f"{role} ×\u00a013": f"{size(nbytes)} · {percent(nbytes, whole)}" for role, nbytes in by_role.items()
        }
        cells = opened.locator("#explorer-every tbody tr").evaluate_all(
            "rows => rows.map(row => [...row.children].map(cell => cell.textContent))"
        )
        assert {row[0]: (row[1], row[3]) for row in cells} == {
            site: (point.method, size(point.bytes)) for site, point in plan.points.items()
        }


def test_the_keyboard_is_enough(opened: Any) -> None:
    slider = opened.locator("#explorer-ratio")
    assert opened.get_by_label("Ratio", exact=True).get_attribute("id") == "explorer-ratio"
    slider.focus()
    before = slider.input_value()
    slider.press("ArrowRight")
    assert int(slider.input_value()) == int(before) + 1
    said = slider.get_attribute("aria-valuetext")
    assert said == (
        f"{shown(opened, 'shown')[:-1]} times smaller, {shown(opened, 'bytes')}, expected loss {shown(opened, 'loss')}"
    )
    slider.press("End")
    assert slider.input_value() == slider.get_attribute("max")
    slider.press("Tab")
    assert opened.evaluate("document.activeElement.id") == "explorer-back"
    opened.keyboard.press("Enter")
    assert slider.input_value() == before and opened.evaluate("document.activeElement.id") == "explorer-ratio"
    # Each control has a name that a screen reader says.
    unnamed = (
        opened.locator("#explorer")
        .locator("button, input, summary")
        .evaluate_all("all => all.filter(one => !(one.textContent || one.labels?.length)).map(one => one.id)")
    )
    assert unnamed == []


def test_the_mark_moves_along_the_curve(opened: Any) -> None:
    dot, slider = opened.locator("#explorer-curve circle.here"), opened.locator("#explorer-ratio")
    places = []
    for stop in ("0", "20", "40"):
        slider.fill(stop)
        places.append((float(dot.get_attribute("cx")), -float(dot.get_attribute("cy"))))
    assert places == sorted(places) and len({x for x, _ in places}) == len({y for _, y in places}) == 3


def test_files_are_laid_over_and_taken_off(opened: Any, explored: Any, tmp_path: Path) -> None:
    peers = [{"name": "<b>other</b> tool", "bytes": 12000, "loss": 0.5}, {"name": "third", "bytes": 9000, "loss": 0.7}]
    (tmp_path / "peers.json").write_text(json.dumps(peers))
    (tmp_path / "wrong.json").write_text('[{"name": "no loss", "bytes": 5}]')
    report = json.loads((explored.artifact / "report.json").read_text())
    report["title"], report["source"]["fingerprint"] = "another", "sha256:other"
    (tmp_path / "report.json").write_text(json.dumps(report))
    names = ("peers.json", "wrong.json", "report.json")
    opened.get_by_label("Lay another report or points over the curve").set_input_files([tmp_path / n for n in names])
    # The page's policy forbids the expressions that wait_for_function evaluates.
    opened.locator("#explorer-status:not(:empty)").wait_for(state="attached")
    assert shown(opened, "status") == (
        "peers.json: <b>other</b> tool; third laid over. wrong.json was left out: loss of point 0 is not a number of at "
        f"least 0. report.json: another, {report['curve']['chosen']['ratio']:.2f}× laid over."
    )
    legend, marks = opened.locator("#explorer-legend"), opened.locator("#explorer-curve .peer")
    assert "of another source" in legend.inner_text() and opened.locator("#explorer-legend b").count() == 0
    # Nothing was measured of a bare file, so its report brings a line alone.
    assert marks.count() == 2 and opened.locator("#explorer-curve polyline[stroke-dasharray]").count() == 1
    opened.get_by_role("button", name="Remove third").click()
    assert marks.count() == 1 and "third" not in legend.inner_text()


@pytest.mark.parametrize("opened", [DESK, PHONE], indirect=True, ids=["desktop", "phone"])
def test_nothing_is_wider_than_the_page(opened: Any) -> None:
    width = opened.evaluate("innerWidth")
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    wide = (
        opened.locator("#explorer")
        .locator("svg, input, pre, .row, .tiles, .legend")
        .evaluate_all("(all, width) => all.filter(one => one.getBoundingClientRect().right > width).length", width)
    )
    assert wide == 0
    # The dial stays in sight while the bars below are read.
    opened.locator("#explorer-sites").scroll_into_view_if_needed()
    assert opened.locator("#explorer-ratio").evaluate("one => one.getBoundingClientRect().top >= 0")


def test_no_script_of_a_hostile_report_runs(browser: Any, explored: Any, tmp_path: Path) -> None:
    hostile = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
    data = json.loads((explored.artifact / "report.json").read_text())
    data["title"] = hostile
    for site in (data["explorer"]["rows"][0], data["sites"][0]):
        site["name"] = hostile
    data["explorer"]["methods"] = [hostile] * len(data["explorer"]["methods"])
    data["explorer"]["bars"] = [hostile] * len(data["explorer"]["bars"])
    data["explorer"]["command"][0] = hostile
    write_page(Report.from_json(data), tmp_path / "page.html", [Overlay(hostile, marks=((9000, 0.5),))])
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    page.locator("#explorer-ratio").press("ArrowRight")
    assert page.title().startswith("</script>") and shown(page, "command").startswith("</script>")
    assert page.locator("img").count() == 0
    # Were markup ever to slip through, the page's policy stops what it would run.
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=\"x\" onerror=\"document.title=1\">')")
    page.wait_for_timeout(100)
    assert page.title().startswith("</script>")
    page.close()
