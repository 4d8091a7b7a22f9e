"""One load in a process of its own, of which memory and time are limited and measured."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import tempfile
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from fuzzing.around import CANARY
from fuzzing.views import Honest, Outcome, attempt, silence

#: Seconds of processor time, and of the clock, after which a load has hung.
PROCESSOR, CLOCK = 10, 30
#: Memory that a load may take: so many times the bytes of its files, and some more.
TIMES, MORE = 4, 200_000_000
#: Address space beyond what there was before; what asks for more than this is refused by the system.
SPACE = 3 << 30


@dataclass
class Load:
    """What became of an artifact.

    Parameters
    ----------
    outcomes
        By view, in the order in which they were tried.
    peak
        Bytes of memory taken beyond what the process had before.
    """

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    peak: int = 0


def load(folder: Path, views: list[str], honest: Honest) -> Load:
    """Load an artifact in several ways, one after another, in a fork of this process."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(out)
        _run(folder, views, honest, into)
    os.close(into)
    late = _wait(child, out)
    with open(out, "rb") as stream:
        lines = stream.read().splitlines()
    _, status, usage = os.wait4(child, 0)
    return _result(folder, views, lines, status, late)


def _wait(child: int, out: int) -> bool:
    """Wait for the end of a process, or end it; whether it was late. What it writes fits the pipe."""
    handle = os.pidfd_open(child)
    try:
        ready, _, _ = select.select([handle], [], [], CLOCK)
        if not ready:
            os.kill(child, signal.SIGKILL)
        return not ready
    finally:
        os.close(handle)


def _result(folder: Path, views: list[str], lines: list[bytes], status: int, late: bool) -> Load:
    result, start = Load(), 0
    for line in lines:
        record = json.loads(line)
        if "start" in record:
            start = record["start"]
        elif "spilled" in record:
            file = Path(record["spilled"])
            record = json.loads(file.read_text())
            file.unlink()
        if "view" in record:
            result.outcomes[record["view"]] = Outcome(record["verdict"], record["detail"])
            result.peak = record["peak"] - start
    if os.WIFSIGNALED(status) or os.WEXITSTATUS(status):
        at = next((view for view in views if view not in result.outcomes), views[-1])
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        if late or number == signal.SIGXCPU:
            result.outcomes[at] = Outcome("timeout", f"more than {CLOCK if late else PROCESSOR} s")
        else:
            result.outcomes[at] = Outcome("crash", signal.Signals(number).name if number else f"exit {os.WEXITSTATUS(status)}")
    if (folder / CANARY).exists() or Path(CANARY).exists():
        result.outcomes[views[-1]] = Outcome("crash", "code of the artifact was run")
    return result


def _run(folder: Path, views: list[str], honest: Honest, into: int) -> None:
    """The child's life."""
    code = 1
    try:
        os.chdir(folder)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        size = _status("VmSize")
        resource.setrlimit(resource.RLIMIT_AS, (size + SPACE, size + SPACE))
        resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR, PROCESSOR + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with open(into, "wb", buffering=0) as stream, silence():
            stream.write(json.dumps({"start": _status("VmRSS")}).encode() + b"\n")
            for view in views:
                outcome = attempt(view, folder, honest)
                record = json.dumps({"view": view, "verdict": outcome.verdict, "detail": outcome.detail, "peak": _status("VmHWM")})
                if len(record) > 4000:
                    with tempfile.NamedTemporaryFile("w", delete=False, suffix=".json") as spilled:
                        spilled.write(record)
                    record = json.dumps({"spilled": spilled.name})
                stream.write(record.encode() + b"\n")
        code = 0
    except BaseException:
        with open("/tmp/fuzz-child-error", "w") as file:
            traceback.print_exc(file=file)
    finally:
        os._exit(code)


def _status(key: str) -> int:
    """Bytes that the system states for this process."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{key}:"))
