"""Code shared by all commands: the application, its two terminals, and the handling of errors."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any, NoReturn

import typer
from rich.text import Text

from octavo.cli.lazy import ListedCommands, list_all, registered
from octavo.cli.net import unforeseen
from octavo.cli.terminal import Terminal, UsageError
from octavo.errors import BudgetError, OctavoError
from octavo.system.notes import OctavoWarning
from octavo.system.records import plain_json
from octavo.system.visible import visible

app = typer.Typer(
    name="octavo",
    cls=ListedCommands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Fold a neural network into the size you state, and prove what it cost.\n\n"
    "Exit codes: 0 done, 1 failed, 2 bad request or bad input, 3 budget unreachable.",
)
list_all(app)
#: Exit code of a command that the user interrupted.
_INTERRUPTED = 130
console = Terminal()
errors = Terminal(stderr=True)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """A command that turns Octavo's errors into one clear line and an exit code."""

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            with warnings.catch_warnings():
                # Commands print notes themselves.
                warnings.simplefilter("ignore", OctavoWarning)
                function(*args, **kwargs)
        except OctavoError as error:
            _fail(error, as_json=bool(kwargs.get("json_output")))
        except KeyboardInterrupt:
            _interrupted(resumes="resume" in kwargs)
        except (typer.Exit, typer.Abort, UsageError):
            raise
        except Exception as error:
            told = unforeseen(error)
            if told is None:
                raise
            _fail(told, as_json=bool(kwargs.get("json_output")))

    return registered.command(name=function.__name__.rstrip("_"))(guarded)


def _interrupted(*, resumes: bool) -> NoReturn:
    # Pressing keys again while the process closes would kill it before it prints how to continue.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    errors.print(f"interrupted; run the same command {'with --resume to continue' if resumes else 'again'}")
    sys.exit(_INTERRUPTED)


def _fail(error: OctavoError, *, as_json: bool) -> NoReturn:
    # If nothing can be printed, the line below still gives the reason.
    with suppress(OSError):
        if as_json:
            show_json({"error": type(error).__name__, "message": str(error), **_details(error)})
            sys.stdout.flush()
    said = Text.assemble(("error:", "bold red"), f" {type(error).__name__}: {visible(error)}")
    # Not wrapped, so that paths can be copied and logs searched.
    errors.print(said, soft_wrap=True)
    sys.exit(error.exit_code)


def _details(error: OctavoError) -> dict[str, Any]:
    return {"limit": error.limit} if isinstance(error, BudgetError) else {}


def show_json(value: Any) -> None:
    """Print JSON, or a record as JSON, for machines on standard output, and nothing else."""
    sys.stdout.write(json.dumps(plain_json(value), default=str) + "\n")


def main() -> None:
    """Entry point."""
    for stream in (sys.stdout, sys.stderr):
        # Characters that the terminal lacks are written as escapes.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except KeyboardInterrupt:
        # The option may be before or after the command.
        with suppress(SystemExit):
            _interrupted(resumes=False)
        _leave()
    except SystemExit as error:
        if error.code == _INTERRUPTED:
            _leave()
        raise
    finally:
        _flush()


def _leave() -> NoReturn:
    """End the process at once: threads that still compute could abort it while the interpreter closes."""
    _flush()
    sys.stderr.flush()
    os._exit(_INTERRUPTED)


def _flush() -> None:
    """Flush the output now, since a failure at exit could not be reported."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # So nothing is left to write when the interpreter closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno != errno.EPIPE:
            errors.print(f"error: standard output cannot be written: {error.strerror}", soft_wrap=True)
            os._exit(1)
