"""Executors for the work on sites: threads of this process, or the workers of a Ray cluster."""

from __future__ import annotations

import os
import socket
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch

from octavo.errors import MissingExtraError, OctavoError, RequestError
from octavo.system.ahead import in_order

Result = TypeVar("Result")

#: Tasks running or queued per worker of a cluster: enough that none idles, few enough that memory is bounded.
_AHEAD = 2
#: Results per thread that may wait for a larger site before them; they are packed, so they take little memory.
_WAITING = 8
#: How often a task is retried on another worker when its worker dies.
_RETRIES = 3
#: Seconds to wait for a cluster to answer.
_PATIENCE = 5.0


class Executor(AbstractContextManager["Executor"], ABC):
    """Runs a pure function over many arguments and yields the results in order.

    A function's result must depend on its arguments alone: then every executor gives the same bytes.
    """

    @abstractmethod
    def map(self, function: Callable[..., Result], arguments: Iterable[tuple]) -> Iterator[Result]:
        """``function(*item)`` for every item; arguments are asked for only shortly before they are needed."""

    @abstractmethod
    def describe(self) -> str:
        """Description of the executor for the report."""

    def __exit__(self, *_: object) -> None:
        """Release the workers."""


class Local(Executor):
    """Threads of this process.

    Parameters
    ----------
    workers
        Number of threads; as many as torch uses by default. Each runs torch on one thread, so results do not depend on
        the number of workers, and threads do not wait for each other inside operations.
    """

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or torch.get_num_threads()

    def map(self, function: Callable[..., Result], arguments: Iterable[tuple]) -> Iterator[Result]:  # noqa: D102
        return in_order(lambda item: function(*item), arguments, self.workers, ahead=_WAITING * self.workers)

    def describe(self) -> str:  # noqa: D102
        return f"{self.workers} threads"


class RayExecutor(Executor):
    """Workers of a Ray cluster, on this machine or at an address.

    If a worker dies, only its own tasks are run again by others.

    Parameters
    ----------
    address
        ``host:port`` of a cluster; None starts workers on this machine until the executor is closed.
    workers
        Workers to start on this machine; one per core by default.

    Raises
    ------
    RequestError
        If nothing answers at the address.
    MissingExtraError
        If Ray is not installed.
    """

    def __init__(self, address: str | None = None, workers: int | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise MissingExtraError("this needs Ray, which is not installed: pip install 'octavo[ray]'") from error
        # Compressing a model must not send usage statistics anywhere.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self._ray, self.address = ray, address
        self._started = not ray.is_initialized()
        if address is not None:
            _require_answer(address)
        if self._started:
            options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
            own = {"num_cpus": workers or os.cpu_count()} if address is None else {"address": address}
            try:
                ray.init(**own, **options)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise RequestError(
                    f"Ray at {address or 'this machine'} cannot be used: {error}; check the address and the versions "
                    "of Ray"
                ) from error
        self.workers = max(1, int(ray.cluster_resources().get("CPU", 1)))

    def map(self, function: Callable[..., Result], arguments: Iterable[tuple]) -> Iterator[Result]:  # noqa: D102
        ray = self._ray
        task = ray.remote(num_cpus=1, max_retries=_RETRIES)(_alone)
        waiting: deque[Any] = deque()
        try:
            for item in arguments:
                waiting.append(task.remote(function, *item))
                if len(waiting) >= _AHEAD * self.workers:
                    yield self._take(waiting.popleft())
            while waiting:
                yield self._take(waiting.popleft())
        finally:
            for reference in waiting:
                ray.cancel(reference, force=False)

    def _take(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            # Errors of a task are raised as if they had occurred here.
            raise error.cause if isinstance(error.cause, OctavoError) else error from None
        except self._ray.exceptions.RayError as error:
            raise OctavoError(
                f"a Ray worker died {_RETRIES + 1} times on the same task: {error}; give the workers more memory"
            ) from error

    def describe(self) -> str:  # noqa: D102
        return f"{self.workers} Ray workers at {self.address or 'this machine'}"

    def __exit__(self, *_: object) -> None:
        if self._started:
            self._ray.shutdown()


@contextmanager
def executor(name: str | Executor | None) -> Iterator[Executor]:
    """The executor of that name, for as long as the context lasts: ``local``, ``ray`` or ``ray://host:port``.

    An executor given as an object is passed through and stays open.

    Raises
    ------
    RequestError
        If the name is not known, or nothing answers at the address.
    """
    if isinstance(name, Executor):
        yield name
        return
    if not isinstance(name, str | None):
        raise RequestError(f"executor {name!r} is not known; give its name, such as 'ray', or an Executor")
    kind, _, address = (name or "local").partition(":")
    if kind not in ("local", "ray") or (kind == "local" and address):
        raise RequestError(f"executor {name!r} is not known; choose local, ray, or ray://host:port of a cluster")
    with Local() if kind == "local" else RayExecutor(address.removeprefix("//") or None) as made:
        yield made


def _alone(function: Callable[..., Result], *arguments: Any) -> Result:
    """Run a task on one thread, like the local executor."""
    torch.set_num_threads(1)
    return function(*arguments)


def _require_answer(address: str) -> None:
    """Raise at once where Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise RequestError(f"Ray address {address!r} is not valid; write it as host:port")
    try:
        with socket.create_connection((host, int(port)), timeout=_PATIENCE):
            pass
    except OSError as error:
        raise RequestError(
            f"nothing answers at the Ray address {address} ({error}); check that the cluster is running"
        ) from error
