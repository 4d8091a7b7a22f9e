"""Progress bars with time left; nothing at all when the output is not a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from octavo.inputs import Progress as Callback
from octavo.inputs import silent

_TITLES = {
    "open": "Reading the source",
    "evidence": "Gathering evidence",
    "profile": "Measuring curves",
    "correct": "Correcting by measured plans",
    "encode": "Encoding",
    "measure": "Measuring speed",
    "write": "Writing",
    "verify": "Reading back",
}


@contextmanager
def progress(console: Console, *, quiet: bool) -> Iterator[Callback]:
    """A callback that draws one bar a step on ``console`` for as long as the context lasts."""
    if quiet or not console.is_terminal:
        yield silent
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks = {}

        def show(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(_TITLES.get(step, step), total=total)
            bars.update(tasks[step], completed=done, total=total)

        yield show
