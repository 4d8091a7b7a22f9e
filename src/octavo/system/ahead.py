"""Work done in threads a little ahead of where its results are used."""

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

    No more than ``threads`` items are being worked on or wait to be used, so that memory does not depend on their
    number. Operations within ``function`` do not split themselves over threads again.

    Parameters
    ----------
    threads
        As many as PyTorch uses if 0.
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
                    # Before the result is used, so that no thread waits for that.
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
    """Give freed memory back to the system.

    Small things that stay keep the blocks of tensors that were freed beside them from being used again, so that memory
    grew with the number of items although nothing is kept of them.
    """
    # Only the C library of GNU/Linux has it, and is in need of it.
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
