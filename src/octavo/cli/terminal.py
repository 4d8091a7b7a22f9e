"""Terminal output: every printed string is shown literally and never interpreted."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from octavo.system.visible import visible

#: Errors of the command line's syntax. Typer has its own copy of click, or uses click's.
UsageError: Any = typer.BadParameter.__base__


class Terminal(Console):
    """A console that prints ``[red]`` and escape sequences as text.

    Strings reach it as lines, as cells and titles of tables, and as headers: all of them through :meth:`render_str`.

    Parameters
    ----------
    stderr
        Whether it writes to standard error.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        """The text with invisible characters as escapes."""
        return super().render_str(visible(text), **options)


class Commands(TyperGroup):
    """The command group; syntax errors of the command line are shown as text too."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        """Parse the arguments before the command's name."""
        try:
            return super().make_context(*args, **options)
        except UsageError as error:
            raise _shown(error) from error

    def invoke(self, ctx: Any) -> Any:
        """Run the named command."""
        try:
            return super().invoke(ctx)
        except UsageError as error:
            raise _shown(error) from error


def _shown(error: Any) -> Any:
    error.message = visible(error.message)
    return error
