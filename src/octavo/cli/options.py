"""Options of the commands: those of a request, made from its fields, and the few that several commands share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any

import typer

from octavo.request import Option, Request, Role, default_of, options


def path(text: str) -> Path:
    """A path as it stands on the command line; an empty one would mean the working folder."""
    if not text:
        raise typer.BadParameter("the path is empty; name a file or folder")
    return Path(text)


OUT = Annotated[Path, typer.Option("--out", "-o", parser=path, help="Folder to write. It must be empty or not exist.")]
DATA = Annotated[Path | None, typer.Option(parser=path, help=options(Request)["data"][1].help)]
OBJECTIVE = Annotated[str | None, typer.Option(help=options(Request)["objective"][1].help)]
OVERWRITE = Annotated[
    bool, typer.Option("--overwrite", help="Replace the file, or the folder that Octavo wrote, at the output's place.")
]
JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines, and no progress.")]


def asking(
    kind: type[Request], *, only: Collection[str] | None = None, without: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function that takes a ``request``: each of its fields becomes an option.

    Parameters
    ----------
    only, without
        Names of the fields that are offered, or left out. A field without a help text is never offered.
    """
    offered = {
        name: (item, how)
        for name, (item, how) in options(kind).items()
        if how.help and name not in without and (only is None or name in only)
    }

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def asked(**given: Any) -> None:
            values = {name: how.read(given.pop(name)) for name, (_, how) in offered.items()}
            function(request=kind(**{"source": None, **values}), **given)

        own = inspect.signature(function, eval_str=True).parameters
        made = [_parameter(name, item, how) for name, (item, how) in offered.items()]
        source = [parameter for parameter in made if parameter.default is inspect.Parameter.empty]
        first = [p for p in own.values() if p.name != "request" and p.default is inspect.Parameter.empty]
        rest = [p for p in own.values() if p.default is not inspect.Parameter.empty]
        parameters = [*source, *first, *(p for p in made if p not in source), *rest]
        asked.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        asked.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return asked

    return decorate


def _parameter(name: str, item: Any, how: Option) -> inspect.Parameter:
    """The parameter of a command that a field of a request becomes."""
    default = default_of(item)
    if default is MISSING:
        annotation: Any = Annotated[str, typer.Argument(help=how.help)]
        return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)
    flags = [f"--{how.flag or name.replace('_', '-')}"]
    spelled: dict[str, Any] = {"help": how.help}
    if how.shown is not None:
        spelled["show_default"] = how.shown
    if how.kind is Path:
        spelled["parser"] = path
    kind = list[str] if how.kind is list else how.kind
    empty = how.kind is list or default is None
    annotation = Annotated[kind | None if empty else kind, typer.Option(*flags, **spelled)]
    return inspect.Parameter(
        name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation, default=None if empty else default
    )


def given(context: typer.Context, kind: type[Request], *roles: Role) -> set[str]:
    """Names of the request's options that stand on the command line, those with their usual value too."""
    sources = {name: context.get_parameter_source(name) for name in options(kind, *roles) if name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
