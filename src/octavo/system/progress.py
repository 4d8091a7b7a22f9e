"""Progress of long work: bars with the time left in a terminal or notebook, nothing elsewhere."""

from __future__ import annotations

import builtins
import functools
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from octavo.system.visible import visible

#: Called with a step's name, the amount done and the total.
Progress = Callable[[str, int, int], Any]
#: The user's choice: a callback, True or False for bars or none, None for bars in a terminal or notebook.
Shown = Progress | bool | None

_TITLES = {
    "open": "Reading the source",
    "evidence": "Gathering evidence",
    "profile": "Measuring curves",
    "correct": "Correcting by measured plans",
    "encode": "Encoding",
    "recover": "Teaching",
    "reconstruct": "Fitting norms, biases and gains",
    "measure": "Measuring speed",
    "write": "Writing",
    "verify": "Reading back",
}
_P = ParamSpec("_P")
_R = TypeVar("_R")
#: Fewest seconds left for a log line, and seconds of work after which the rest is estimated.
_LONG, _SEEN = 30.0, 2.0
_WIDTH = 24


def silent(step: str, done: int, total: int) -> None:
    """No progress."""


def callback(choice: Shown) -> Progress:
    """The callback that :func:`with_progress` made of the user's choice."""
    return choice if callable(choice) else silent


class Estimates:
    """Logs once per step how long it will take, as soon as that can be estimated."""

    def __init__(self) -> None:
        self._begun: dict[str, tuple[float, int]] = {}
        self._told: set[str] = set()

    def __call__(self, step: str, done: int, total: int) -> None:
        """Record the amount done."""
        now = time.monotonic()
        start, before = self._begun.setdefault(step, (now, done))
        if step in self._told or now - start < _SEEN or done <= before:
            return
        self._told.add(step)
        left = (now - start) / (done - before) * (total - done)
        if left >= _LONG:
            logging.getLogger("octavo").info("%s: about %s left", _TITLES.get(step, step), spoken(left))


def spoken(seconds: float) -> str:
    """A duration in words, such as ``5 minutes``."""
    for unit, scale in (("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * scale:
            return f"{seconds / scale:.0f} {unit}"
    return f"{seconds:.0f} seconds"


class Bars:
    """Draws one bar per step on standard error while its context lasts; contexts may nest."""

    def __init__(self) -> None:
        self._depth = 0
        self._drawing: _Rich | _Line = _Line()
        self._estimates = Estimates()

    def __enter__(self) -> Bars:
        if not self._depth:
            self._drawing = _Rich() if _in_terminal() and not in_notebook() else _Line()
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if not self._depth:
            self._drawing.close()

    def __call__(self, step: str, done: int, total: int) -> None:
        """Draw."""
        self._estimates(step, done, total)
        if self._depth:
            self._drawing.show(step, done, total)


class _Rich:
    """Bars in a terminal, removed when they are done."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self._bars = RichProgress(*columns, console=Console(stderr=True), transient=True)
        self._tasks: dict[str, Any] = {}
        self._bars.start()

    def show(self, step: str, done: int, total: int) -> None:
        if step not in self._tasks:
            self._tasks[step] = self._bars.add_task(visible(_TITLES.get(step, step)), total=total)
        self._bars.update(self._tasks[step], completed=done, total=total)

    def close(self) -> None:
        self._bars.stop()


class _Line:
    """A bar for outputs that can only redraw the last line, such as notebooks."""

    def __init__(self) -> None:
        self._step, self._start, self._before, self._drawn = "", 0.0, 0, 0.0

    def show(self, step: str, done: int, total: int) -> None:
        now = time.monotonic()
        if step != self._step:
            if self._step:
                sys.stderr.write("\n")
            self._step, self._start, self._before, self._drawn = step, now, done, 0.0
        # A notebook keeps up with a few lines a second.
        if now - self._drawn < 0.2 and done < total:
            return
        self._drawn = now
        worked = done - self._before
        left = spoken((now - self._start) / worked * (total - done)) + " left" if worked and done < total else ""
        filled = _WIDTH * done // max(total, 1)
        bar = "━" * filled + " " * (_WIDTH - filled)
        sys.stderr.write(f"\r{visible(_TITLES.get(step, step))} {bar} {done}/{total} {left:<16}")
        sys.stderr.flush()

    def close(self) -> None:
        if self._step:
            sys.stderr.write("\n")


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    shell = getattr(builtins, "get_ipython", lambda: None)()
    return shell is not None and type(shell).__name__ != "TerminalInteractiveShell"


def _in_terminal() -> bool:
    return Console(stderr=True).is_terminal


@contextmanager
def showing(choice: Shown) -> Iterator[Progress]:
    """A context that shows progress as chosen; yields the callback."""
    if isinstance(choice, Bars):
        with choice:
            yield choice
    elif callable(choice):
        yield choice
    elif choice or (choice is None and (in_notebook() or _in_terminal())):
        with Bars() as bars:
            yield bars
    else:
        yield Estimates() if choice is None else silent


def with_progress(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a function take the user's choice of ``progress`` and use it as a callback (:func:`callback`)."""

    @functools.wraps(function)
    def shown(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with showing(kwargs.get("progress")) as show:  # type: ignore[arg-type]
            kwargs["progress"] = show
            return function(*args, **kwargs)

    return shown
