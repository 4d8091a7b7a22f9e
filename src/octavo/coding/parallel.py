"""Threads for chunks; both coders and NumPy's larger operations release the interpreter lock."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

# Starting threads takes longer than coding this many elements.
_WORTHWHILE = 1 << 20


def run(function: Callable[[Job], Result], jobs: Iterable[Job], elements: int) -> list[Result]:
    """Apply `function` to all jobs, which handle `elements` elements in total."""
    if elements < _WORTHWHILE:
        return [function(job) for job in jobs]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, jobs))
