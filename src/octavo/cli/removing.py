"""The command that makes a model thinner: whole units go, and nothing is encoded."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from octavo.cli import options
from octavo.cli.folding import carry_out, work_beside
from octavo.cli.frame import command
from octavo.cuts.structured import Structured
from octavo.request import Request
from octavo.system.paths import checked_output


@command
@options.asking(Request, only=("source", "ratio", "size", "bits", "data", "objective", "recover", "minutes", "seed"))
def cut(
    request: Request,
    out: options.OUT,
    score: Annotated[
        str,
        typer.Option(help="What units are worth, such as taylor, fisher or activation: octavo methods --kind scores."),
    ] = "taylor",
    units: Annotated[
        str,
        typer.Option(help="Kinds of units that may go, with commas: head, neuron, column, layer; channel."),
    ] = "head,neuron,channel",
    compensate: Annotated[
        bool, typer.Option(help="Fit the matrix that read a unit again, so that what is left compensates.")
    ] = True,
    overwrite: options.OVERWRITE = False,
    json_output: options.JSON = False,
) -> None:
    """Remove whole units of SOURCE to a size: tensors become smaller, and the model faster everywhere.

    The weights that stay are stored as they are. 'octavo compress --methods structured,...' encodes them as well.

    Example: octavo cut all-MiniLM-L6-v2 --ratio 1.3 --score taylor --out thinner
    """
    out = checked_output(out)
    kinds = tuple(kind.strip() for kind in units.split(",") if kind.strip())
    made = Structured(kinds, score, compensate)
    carry_out(
        replace(request, methods=[made], workspace=work_beside(out)), out, overwrite=overwrite, json_output=json_output
    )
