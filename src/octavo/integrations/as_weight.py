"""How weights are made from forms while a library's own loader builds a model around them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from octavo.artifact.reading import AsWeight

_CHOSEN: ContextVar[AsWeight | None] = ContextVar("octavo_as_weight", default=None)


@contextmanager
def made_by(as_weight: AsWeight) -> Iterator[None]:
    """A context in which weights that stay packed are made so."""
    token = _CHOSEN.set(as_weight)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def chosen() -> AsWeight | None:
    """What makes weights here; None where nothing was chosen."""
    return _CHOSEN.get()
