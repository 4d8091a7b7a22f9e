"""Work done in threads a little ahead of where its results are used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()
    finally:
        torch.set_num_threads(before)
