"""The list of commands: what each is for, and the file that is imported once it is called.

The files import PyTorch, which takes seconds, and ``octavo --help`` needs none of them.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import typer

from octavo.cli.terminal import Commands


class Listed(NamedTuple):
    """A command in the list: the file beside this one that holds it, and the first sentence of its help."""

    module: str
    help: str


COMMANDS = {
    "export": Listed("exporting", "Export MODEL to a file for a fast runtime, and compare that file with MODEL."),
    "compress": Listed("folding", "Compress SOURCE to a size, and write artifact and report to --out."),
    "profile": Listed(
        "folding",
        "Measure SOURCE once over all sizes; 'octavo plan' and 'octavo compress --profile' then solve it for any.",
    ),
    "plan": Listed(
        "folding", "Solve a saved profile for a size, in a moment, and write the plan as YAML that can be edited."
    ),
    "frontier": Listed(
        "folding",
        "Build SOURCE at several ratios and measure each, next to the best uniform plan of the same bytes.",
    ),
    "inspect": Listed("looking", "Show what an artifact holds, from its manifest alone; nothing is decoded."),
    "verify": Listed(
        "looking", "Read an artifact back: sizes, checksums, weights and outputs as recorded when it was written."
    ),
    "evaluate": Listed("looking", "Measure a model or an artifact on data."),
    "methods": Listed(
        "listing", "List all methods, or all parts of another --kind, such as forms, cuts or targets."
    ),
    "reproduce": Listed("reproducing", "Rebuild a published system, and check its claim on real data."),
}
#: Where the commands of imported files are.
registered = typer.Typer(rich_markup_mode="rich")


@registered.callback()
def _group() -> None:
    """With a callback it is a group, of however few commands."""


class ListedCommands(Commands):
    """Commands that are listed without being imported."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the words name, imported, and the words after its name."""
        name, listed, rest = super().resolve_command(ctx, args)
        return name, listed if name is None else command_named(name), rest


def command_named(name: str) -> Any:
    """A command of :data:`COMMANDS`, imported."""
    importlib.import_module(f"octavo.cli.{COMMANDS[name].module}")
    group: Any = typer.main.get_command(registered)
    return group.commands[name]


def list_all(app: typer.Typer) -> None:
    """Add what is listed to an application."""
    for name, listed in COMMANDS.items():
        app.command(name=name, help=listed.help)(_placeholder)


def _placeholder() -> None:
    """In the list it stands for a command that is not imported."""
