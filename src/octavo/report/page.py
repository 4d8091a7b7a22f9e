"""Writing the report: one offline HTML page, and a JSON file with its data."""

import base64
import hashlib
import json
from collections.abc import Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from string import Template

from octavo.errors import RequestError
from octavo.report import explorer, sections, sites
from octavo.report.markup import join
from octavo.report.overlays import Overlay
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


def write_page(report: Report, path: Path, overlays: Sequence[Overlay] = ()) -> None:
    """Write the page alone, with what is laid over the explorer's curve.

    Raises
    ------
    MissingExtraError
        If matplotlib is not installed.
    """
    write_file(path, _render(report, overlays).encode())


def write_json(report: Report, path: Path) -> None:
    """Write the report as JSON alone."""
    data = report.to_json()
    # Tens of thousands of numbers, one a line, would bury the rest.
    stops = json.dumps(data.pop("explorer"), separators=(",", ":"), allow_nan=False)
    # Names may hold lone surrogates from unusual file systems, which JSON can represent in ASCII.
    rest = json.dumps(data, indent=1, allow_nan=False).removesuffix("\n}")
    write_file(path, f'{rest},\n "explorer": {stops}\n}}\n'.encode())


def _render(report: Report, overlays: Sequence[Overlay] = ()) -> str:
    order = (
        sections.outcome,
        sections.of_target,
        sections.tradeoff,
        partial(explorer.section_of, overlays=overlays),
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
    script = explorer.script() if report.explorer.stops else ""
    # The browser runs the script of this hash and no other, whatever a name in the report may hold.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return template.substitute(
        title=join(plain(report.title)),
        headline=sentence,
        made=join(made),
        body="\n".join(parts),
        policy=f"; script-src 'sha256-{digest}'" if script else "",
        script=f"<script>{script}</script>" if script else "",
    )
