"""The terminal: every string that a command prints is shown as it is, and obeyed by nobody."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from octavo.system.visible import visible

#: What is wrong with the words of a command line. Typer brings its own copy of click, or uses click's.
UsageError: Any = typer.BadParameter.__base__


class Terminal(Console):
    """A console to which ``[red]`` is text, and so is an escape sequence.

    Strings reach it as lines, as cells and titles of tables, and as headers: all of them through :meth:`render_str`.

    Parameters
    ----------
    stderr
        Whether it writes to standard error.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        """The text with what is not visible written out."""
        return super().render_str(visible(text), **options)


class Commands(TyperGroup):
    """The commands; what is wrong with the words of a command line is shown as text too."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        """Read the words before the command's name."""
        try:
            return super().make_context(*args, **options)
        except UsageError as error:
            raise _shown(error) from error

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was named."""
        try:
            return super().invoke(ctx)
        except UsageError as error:
            raise _shown(error) from error


def _shown(error: Any) -> Any:
    error.message = visible(error.message)
    return error
