"""Work done in threads slightly before its results are used."""

from __future__ import annotations

import ctypes
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from itertools import islice
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
#: Seconds from one return of freed memory to the next. Done after every small site it takes a twentieth of the time.
_PAUSE = 0.5


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int = 0, *, ahead: int = 0
) -> Iterator[Result]:
    """Results of ``function`` in the order of ``items``.

    At most ``threads`` items are in progress or waiting to be used, and ``ahead`` more while the first of them is not
    done. So memory does not depend on the number of items. Operations inside ``function`` run on one thread each.

    Parameters
    ----------
    threads
        Number of threads; 0 uses PyTorch's number.
    ahead
        Results that may wait for an earlier one that takes longer, so that no thread waits for it.
    """
    before = torch.get_num_threads()
    threads = threads or before
    waiting: deque[Future[Result]] = deque()
    released = time.monotonic()
    # One item is ready when a thread becomes free.
    source = iter(items)
    ready = list(islice(source, 1))

    def unfinished() -> list[Future[Result]]:
        return [future for future in waiting if not future.done()]

    def begin() -> None:
        """Give free threads what comes next, as far as results may wait."""
        while ready and len(unfinished()) < threads:
            if len(waiting) >= threads and (len(waiting) >= threads + ahead or waiting[0].done()):
                return
            waiting.append(pool.submit(function, ready.pop()))
            ready.extend(islice(source, 1))

    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                while ready or waiting:
                    begin()
                    if not waiting[0].done():
                        wait(unfinished(), return_when=FIRST_COMPLETED)
                        continue
                    result = waiting.popleft().result()
                    # Before the result is used, so that no thread waits for that.
                    begin()
                    yield result
                    del result
                    released = _released(released)
            finally:
                for future in waiting:
                    future.cancel()
    finally:
        torch.set_num_threads(before)


def _released(before: float) -> float:
    """Return freed memory to the system, not too often; when that was last done.

    Small live allocations prevent the reuse of freed tensor blocks next to them. Without this, memory would grow with
    the number of items although nothing of them is kept.
    """
    now = time.monotonic()
    if now - before < _PAUSE:
        return before
    # Only the C library of GNU/Linux has this call, and only it needs it.
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    return now
