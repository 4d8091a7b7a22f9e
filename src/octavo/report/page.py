"""Writing the report: one offline HTML page, and the dictionary it was made from beside it."""

import json
from importlib import resources
from pathlib import Path
from string import Template

from octavo.errors import RequestError
from octavo.report import sections, sites
from octavo.report.markup import join
from octavo.report.pictures import require_matplotlib
from octavo.report.schema import Report
from octavo.report.summary import headline
from octavo.report.text import moment, plain
from octavo.system.atomic import write_file


def write(report: Report, path: Path) -> None:
    """Write the report as an HTML page, and as JSON beside it.

    The page loads nothing: no script, no font, no picture from elsewhere. Each file appears
    complete or not at all.

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
        If ``path`` has no place for the JSON beside it.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        raise RequestError(f"{path}: the page needs another name than the JSON beside it, such as report.html")
    page = _render(report)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(report, path.with_suffix(".json"))
    write_file(path, page.encode())


def write_json(report: Report, path: Path) -> None:
    """Write the report as JSON alone."""
    # Names may hold lone surrogates from odd file systems: ASCII can carry them in JSON.
    write_file(path, (json.dumps(report.to_json(), indent=1, allow_nan=False) + "\n").encode())


def _render(report: Report) -> str:
    require_matplotlib()
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
