"""The command that writes a report's page again: report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from octavo.cli import options
from octavo.cli.frame import command, console, show_json
from octavo.report import read_overlays, read_report, write_page
from octavo.system.paths import checked, checked_output
from octavo.system.replacing import check_file
from octavo.verification.recorded import REPORT


@command
def report(
    artifact: Annotated[
        Path,
        typer.Argument(
            parser=options.path, help="Folder with the report.json of an artifact, or of files for another runtime."
        ),
    ],
    over: Annotated[
        list[Path] | None,
        typer.Option(
            parser=options.path,
            help="Another artifact's report.json, or a JSON list of points with name, bytes and loss, to lay over the "
            "curve. Repeatable.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", parser=options.path, help="Page to write; default: the artifact's.")
    ] = None,
    overwrite: options.OVERWRITE = False,
    json_output: options.JSON = False,
) -> None:
    """Write the report page of an artifact again, with other results laid over its curve.

    Example: octavo report folded --over other/report.json --over peers.json
    """
    page = checked(artifact) / REPORT
    file = page if out is None else check_file(checked_output(out), overwrite=overwrite)
    overlays = [overlay for path in over or () for overlay in read_overlays(path)]
    write_page(read_report(page.with_suffix(".json")), file, overlays)
    if json_output:
        show_json({"report": str(file), "over": [overlay.name for overlay in overlays]})
    else:
        for line in (f"Report: {file}", *(f"laid over: {overlay.name}" for overlay in overlays)):
            console.print(line, soft_wrap=True)
