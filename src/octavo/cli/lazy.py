"""The list of commands: the help of each, and the file that is imported when it is called.

The files import PyTorch, which takes seconds, and ``octavo --help`` needs none of them.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import typer

from octavo.cli.terminal import Commands


class Listed(NamedTuple):
    """A command in the list: its file in this folder, and the first sentence of its help."""

    module: str
    help: str


COMMANDS = {
    "export": Listed("exporting", "Export MODEL to a file for a fast runtime, and compare that file with MODEL."),
    "compress": Listed("folding", "Compress SOURCE to a size, and write artifact and report to --out."),
    "cut": Listed(
        "removing", "Remove whole units of SOURCE to a size: tensors become smaller, and the model faster everywhere."
    ),
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
    "inspect": Listed("looking", "Show the content of an artifact from its manifest, without decoding."),
    "verify": Listed(
        "looking", "Read an artifact back: sizes, checksums, weights and outputs as recorded when it was written."
    ),
    "evaluate": Listed("looking", "Measure a model or an artifact on data."),
    "report": Listed(
        "reporting", "Write the report page of an artifact again, with other results laid over its curve."
    ),
    "methods": Listed("listing", "List all methods, or all parts of another --kind, such as forms, cuts or targets."),
    "reproduce": Listed("reproducing", "Rebuild a published system, and check its claims on real data."),
}
#: The commands of imported files.
registered = typer.Typer(rich_markup_mode="rich")


@registered.callback()
def _group() -> None:
    """With a callback this is always a group, even with one command."""


class ListedCommands(Commands):
    """A group that lists commands without importing them."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Import the named command; returns it with the remaining arguments."""
        name, listed, rest = super().resolve_command(ctx, args)
        return name, listed if name is None else command_named(name), rest


def command_named(name: str) -> Any:
    """Import a command of :data:`COMMANDS`."""
    importlib.import_module(f"octavo.cli.{COMMANDS[name].module}")
    group: Any = typer.main.get_command(registered)
    return group.commands[name]


def list_all(app: typer.Typer) -> None:
    """Add the listed commands to an application."""
    for name, listed in COMMANDS.items():
        app.command(name=name, help=listed.help)(_placeholder)


def _placeholder() -> None:
    """Represents a command that is not imported."""
