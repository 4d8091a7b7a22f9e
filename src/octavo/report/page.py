"""Writing the report: one offline HTML page, and a JSON file with its data."""

import json
import math
import os
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from octavo.errors import RequestError
from octavo.report import sections, sites
from octavo.report.markup import join
from octavo.report.summary import headline
from octavo.report.text import moment, plain
from octavo.system.replacing import check_kind


def write(data: dict[str, Any], path: Path) -> None:
    """Write the report as an HTML page, and its data as JSON next to it.

    The page loads no scripts, fonts or pictures from elsewhere. Each file is written atomically.

    Parameters
    ----------
    data : dict
        The report, of plain values only. Numbers that are not finite become null.
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
    data = _finite(data)
    page = _render(data)
    # Names may hold lone surrogates from unusual file systems, which JSON can represent in ASCII.
    facts = json.dumps(data, indent=1, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path.with_suffix(".json"), facts + "\n")
    _replace(path, page)


def _render(data: dict[str, Any]) -> str:
    order = (
        sections.outcome,
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
    sentence = join(headline(data).replace(" -> ", " → ", 1)).replace("x smaller", "×&nbsp;smaller", 1)
    made = f"Octavo {plain(data['octavo_version'], 40)}, {moment(data['created'])}, preset {plain(data['preset'], 40)}"
    return template.substitute(
        title=join(plain(data["title"])),
        headline=sentence,
        made=join(made),
        body="\n".join(draw(data) for draw in order),
    )


def _finite(value: Any) -> Any:
    """Return a copy in which numbers that JSON cannot represent are None, shown as not measured."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path: Path, text: str) -> None:
    check_kind(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
