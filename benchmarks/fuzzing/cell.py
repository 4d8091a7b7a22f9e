"""Loads in processes of their own, of which memory and time are limited and measured."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import select
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from fuzzing.around import CANARY
from fuzzing.views import Honest, Outcome, attempt, silence

#: Seconds of processor time, and of the clock, after which one way of loading has hung.
PROCESSOR, CLOCK = 10, 40
#: Memory that a load may take: so many times the bytes of its files, and some more.
TIMES, MORE = 4, 200_000_000
#: Address space beyond what there was before; what asks for more than this is refused by the system.
SPACE = 3 << 30


@dataclass(frozen=True)
class Case:
    """An artifact to be loaded in several ways, one after another."""

    folder: Path
    views: tuple[str, ...]
    honest: Honest


@dataclass
class Load:
    """What became of a case.

    Parameters
    ----------
    outcomes
        By view, in the order in which they were tried.
    peaks
        Bytes of memory taken beyond what the process had before the first, by view.
    """

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)


def load(cases: Sequence[Case]) -> Iterator[Load]:
    """Load artifacts in forks of this process: one fork for all, but a new one after each that ends it or takes much."""
    done = 0
    while done < len(cases):
        for found in _in_one_process(cases[done:]):
            yield found
            done += 1


def _in_one_process(cases: Sequence[Case]) -> Iterator[Load]:
    """What a fork makes of the first cases, as many as it survives."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(out)
        _live(cases, into)
    os.close(into)
    late, current = False, Load()
    done = iter(cases)
    for line in _lines(out):
        if line is None:
            late = True
            os.kill(child, signal.SIGKILL)
            break
        record = json.loads(line)
        if "view" in record:
            current.outcomes[record["view"]] = Outcome(record["verdict"], record["detail"])
            current.peaks[record["view"]] = record["peak"]
        else:
            yield _checked(current, next(done))
            current = Load()
    os.close(out)
    _, ended = os.waitpid(child, 0)
    broken = next(done, None)
    if broken is not None and (os.WIFSIGNALED(ended) or os.WEXITSTATUS(ended)):
        at = next((view for view in broken.views if view not in current.outcomes), broken.views[-1])
        number = os.WTERMSIG(ended) if os.WIFSIGNALED(ended) else 0
        if late or number == signal.SIGXCPU:
            current.outcomes[at] = Outcome("timeout", f"more than {CLOCK if late else PROCESSOR} s")
        else:
            what = signal.Signals(number).name if number else f"exit {os.WEXITSTATUS(ended)}"
            current.outcomes[at] = Outcome("crash", what)
        yield _checked(current, broken)


def _lines(out: int) -> Iterator[bytes | None]:
    """Lines as they come, until the end; None if one does not come in time."""
    rest = b""
    while True:
        ready, _, _ = select.select([out], [], [], CLOCK)
        if not ready:
            yield None
            return
        more = os.read(out, 1 << 16)
        if not more:
            return
        *whole, rest = (rest + more).split(b"\n")
        yield from whole


def _checked(found: Load, case: Case) -> Load:
    if (case.folder / CANARY).exists():
        found.outcomes[case.views[-1]] = Outcome("crash", "code of the artifact was run")
    return found


def _live(cases: Sequence[Case], into: int) -> None:
    """The child's life."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        size = status("VmSize")
        resource.setrlimit(resource.RLIMIT_AS, (size + SPACE, size + SPACE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with open(into, "wb", buffering=0) as stream, silence():
            for case in cases:
                peak = _one(case, stream)
                _write(stream, {"done": True})
                if peak > MORE // 2:
                    break
        code = 0
    finally:
        os._exit(code)


def _one(case: Case, stream: IO[bytes]) -> int:
    os.chdir(case.folder)
    gc.collect()
    # What earlier loads left free in the allocator would hide what this one takes.
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    start, peak = status("VmRSS"), 0
    for view in case.views:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + 1 + PROCESSOR
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        outcome = attempt(view, case.folder, case.honest)
        peak = max(0, status("VmHWM") - start)
        _write(stream, {"view": view, "verdict": outcome.verdict, "detail": outcome.detail, "peak": peak})
    return peak


def _write(stream: IO[bytes], record: dict[str, Any]) -> None:
    content = memoryview(json.dumps(record).encode() + b"\n")
    while content:
        content = content[stream.write(content) :]


def status(key: str) -> int:
    """Bytes that the system states for this process."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{key}:"))
