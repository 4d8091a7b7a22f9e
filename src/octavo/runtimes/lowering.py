"""How runtimes lower forms: a table by form class, which runtimes and plugins fill."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from octavo.forms import Form

L = TypeVar("L")


class Lowering(Generic[L]):
    """The functions or kernel classes of a runtime, by form class.

    ``@lowering(Grid)`` registers the decorated object for a class and its subclasses. A form of another package
    registers in the same way when its package is imported.

    Parameters
    ----------
    what
        Description of the registered objects for messages.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._known: dict[type[Form], list[L]] = {}

    def __call__(self, *kinds: type[Form]) -> Callable[[L], L]:
        """Register for these form classes; earlier registrations are preferred."""

        def register(lower: L) -> L:
            for kind in kinds:
                self._known.setdefault(kind, []).append(lower)
            return lower

        return register

    def every(self, form: Form) -> list[L]:
        """All registrations for a form, those of its own class first and those of base classes last."""
        return [lower for kind in type(form).__mro__ for lower in self._known.get(kind, ())]

    def find(self, form: Form) -> L | None:
        """The preferred registration for a form; None if there is none (:meth:`missing` gives the reason)."""
        return next(iter(self.every(form)), None)

    def missing(self, form: Form) -> str | None:
        """The reason why a form is decoded to a dense matrix; None if it has a registration."""
        return None if self.every(form) else f"no {self.what} is registered for the form {form.name!r}: it runs decoded"
