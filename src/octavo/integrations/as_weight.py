"""The choice of weight class for forms while a library's own loader builds a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from octavo.artifact.reading import AsWeight

_CHOSEN: ContextVar[AsWeight | None] = ContextVar("octavo_as_weight", default=None)


@contextmanager
def made_by(as_weight: AsWeight) -> Iterator[None]:
    """A context that sets how packed weights are created."""
    token = _CHOSEN.set(as_weight)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def chosen() -> AsWeight | None:
    """The current function that creates weights; None if none was set."""
    return _CHOSEN.get()
