"""Work done in threads slightly before its results are used."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(function: Callable[[Item], Result], items: Iterable[Item], threads: int = 0) -> Iterator[Result]:
    """Results of ``function`` in the order of ``items``.

    At most ``threads`` items are in progress or waiting to be used, so memory does not depend on the number of items.
    Operations inside ``function`` run on one thread each.

    Parameters
    ----------
    threads
        Number of threads; 0 uses PyTorch's number.
    """
    before = torch.get_num_threads()
    threads = threads or before
    waiting: deque[Future[Result]] = deque()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                for item in items:
                    if len(waiting) < threads:
                        waiting.append(pool.submit(function, item))
                        continue
                    result = waiting.popleft().result()
                    # Submitted before the result is used, so that no thread waits for that.
                    waiting.append(pool.submit(function, item))
                    yield result
                    del result
                    _release()
                while waiting:
                    yield waiting.popleft().result()
                    _release()
            finally:
                for future in waiting:
                    future.cancel()
    finally:
        torch.set_num_threads(before)


def _release() -> None:
    """Return freed memory to the system.

    Small live allocations prevent the reuse of freed tensor blocks next to them. Without this, memory would grow with
    the number of items although nothing of them is kept.
    """
    # Only the C library of GNU/Linux has this call, and only it needs it.
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
