"""Writing the report: one offline HTML page, and the dictionary it was made from beside it."""

import json
import math
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from octavo.errors import MissingExtraError, RequestError
from octavo.report.markup import join
from octavo.report.summary import headline
from octavo.report.text import moment, plain
from octavo.system.atomic import write_file


def write(data: dict[str, Any], path: Path) -> None:
    """Write the report as an HTML page, and its data as JSON beside it.

    The page loads nothing: no script, no font, no picture from elsewhere. Each file appears
    complete or not at all.

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
        If ``path`` has no place for the JSON beside it.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        raise RequestError(f"{path}: the page needs another name than the JSON beside it, such as report.html")
    data = _finite(data)
    page = _render(data)
    # Names may hold lone surrogates from odd file systems: ASCII can carry them in JSON.
    facts = json.dumps(data, indent=1, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path.with_suffix(".json"), (facts + "\n").encode())
    write_file(path, page.encode())


def _render(data: dict[str, Any]) -> str:
    try:
        from octavo.report import sections, sites
    except ImportError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        raise MissingExtraError("the HTML report needs matplotlib: pip install octavo[report]") from error
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
    """Return a copy in which numbers that JSON cannot write are None, which reads as not measured."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
