"""The command that lists what is registered: methods, forms, cuts, scores, regimens, targets, flows and studies."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import typer

from octavo.cli import options
from octavo.cli.frame import command, console, show_json
from octavo.cuts import CUTS, SCORES
from octavo.errors import RequestError
from octavo.flows import FLOWS
from octavo.forms import FORMS
from octavo.methods import METHODS
from octavo.recipes.frame import STUDIES
from octavo.system.registry import Registry
from octavo.targets import TARGETS
from octavo.training import REGIMENS


class _Kind(NamedTuple):
    """Where parts of a kind are registered, and what else is told of each."""

    registry: Registry[Any]
    columns: Callable[[Any], dict[str, str]]


def _first_sentence(part: Any) -> str:
    paragraph = " ".join((part.__doc__ or "").strip().split("\n\n")[0].split())
    return re.split(r"(?<=\w)\. (?=[A-Z`])", paragraph)[0].replace("``", "").rstrip(".")


def _described(*names: str) -> Callable[[Any], dict[str, str]]:
    return lambda part: {**{name: getattr(part, name) for name in names}, "what": _first_sentence(part)}


KINDS = {
    "methods": _Kind(METHODS, _described("family", "preset")),
    "forms": _Kind(FORMS, _described()),
    "cuts": _Kind(CUTS, _described()),
    "scores": _Kind(SCORES, _described()),
    "regimens": _Kind(REGIMENS, _described()),
    "targets": _Kind(TARGETS, lambda part: {"what": part.about or _first_sentence(part)}),
    "flows": _Kind(FLOWS, _described("carries")),
    "studies": _Kind(STUDIES, lambda part: {"what": f"{part.system}: {next(iter(part.claims.values()))}"}),
}


@command
def methods(
    kind: Annotated[str, typer.Option(help=f"What to list: {', '.join(KINDS)}.")] = "methods",
    json_output: options.JSON = False,
) -> None:
    """List all methods, or all parts of another --kind, such as forms, cuts or targets.

    Example: octavo methods --kind flows
    """
    if kind not in KINDS:
        raise RequestError(f"--kind {kind!r} is not known; choose from {', '.join(KINDS)}")
    rows = []
    for name, part in KINDS[kind].registry.all().items():
        source = getattr(part, "source", "")
        rows.append({"name": name, **KINDS[kind].columns(part), **({"source": source} if source else {})})
    if json_output:
        show_json(rows)
        return
    show_lines([[value for key, value in row.items() if key != "source"] for row in rows])


def show_lines(rows: Sequence[Sequence[str]]) -> None:
    """Print one line a row; columns are aligned, and what does not fit the terminal is left out of the last one."""
    if not rows:
        console.print("none")
    widths = [max(map(len, column)) for column in zip(*(row[:-1] for row in rows), strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)]
        line = "  ".join(cells)
        over = len(line) > console.width
        console.print(f"{line[: console.width - 3].rstrip()}..." if over else line, soft_wrap=True, highlight=False)
