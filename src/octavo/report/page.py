"""Writing the report: one offline HTML page, and a JSON file with its data."""

import json
from importlib import resources
from pathlib import Path
from string import Template

from octavo.errors import RequestError
from octavo.report import sections, sites
from octavo.report.markup import join
from octavo.report.schema import Report
from octavo.report.summary import headline
from octavo.report.text import moment, plain
from octavo.system.atomic import write_file


def write(report: Report, path: Path) -> None:
    """Write the report as an HTML page, and as JSON next to it.

    The page loads no scripts, fonts or pictures from elsewhere. Each file is written atomically.

    Parameters
    ----------
    report : Report
        The report. Numbers that are not finite become null.
    path : Path
        Where to write the page; the JSON goes to ``path.with_suffix(".json")``.

    Raises
    ------
    MissingExtraError
        If matplotlib is not installed. Nothing is written then.
    RequestError
        If ``path`` would collide with the JSON file.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        raise RequestError(
            f"{path}: the page and its JSON file would have the same name; choose another, such as report.html"
        )
    page = _render(report)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(report, path.with_suffix(".json"))
    write_file(path, page.encode())


def write_json(report: Report, path: Path) -> None:
    """Write the report as JSON alone."""
    # Names may hold lone surrogates from unusual file systems, which JSON can represent in ASCII.
    write_file(path, (json.dumps(report.to_json(), indent=1, allow_nan=False) + "\n").encode())


def _render(report: Report) -> str:
    order = (
        sections.outcome,
        sections.of_target,
        sections.tradeoff,
        sites.spread,
        sites.families,
        sections.lengths,
        sites.worst,
        sites.every,
        sites.kept,
        sections.calibration,
        sections.effort,
        sections.reproduction,
    )
    template = Template(resources.files("octavo.report").joinpath("page.html").read_text(encoding="utf-8"))
    sentence = join(headline(report).replace(" -> ", " → ", 1)).replace("x smaller", "×&nbsp;smaller", 1)
    made = f"Octavo {plain(report.octavo_version, 40)}, {moment(report.created)}, preset {plain(report.preset, 40)}"
    parts = filter(None, (draw(report) for draw in order))
    return template.substitute(
        title=join(plain(report.title)),
        headline=sentence,
        made=join(made),
        body="\n".join(parts),
    )
