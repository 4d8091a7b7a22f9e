"""How runtimes say what they do with which form: a table of classes that every runtime fills, and plugins as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from octavo.forms import Form

L = TypeVar("L")


class Lowering(Generic[L]):
    """What a runtime has for which forms: functions, or classes of kernels.

    ``@lowering(Grid)`` registers what it decorates for a class and its subclasses. A form of another package registers
    in the same way, where the package is imported.

    Parameters
    ----------
    what
        What runtimes are asked for, for messages.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._known: dict[type[Form], list[L]] = {}

    def __call__(self, *kinds: type[Form]) -> Callable[[L], L]:
        """Register for these classes of forms; what is registered first is preferred."""

        def register(lower: L) -> L:
            for kind in kinds:
                self._known.setdefault(kind, []).append(lower)
            return lower

        return register

    def every(self, form: Form) -> list[L]:
        """Everything that is registered for a form, for its own class first and for that it derives from last."""
        return [lower for kind in type(form).__mro__ for lower in self._known.get(kind, ())]

    def find(self, form: Form) -> L | None:
        """What is preferred for a form; None if nothing is registered, as :meth:`missing` says."""
        return next(iter(self.every(form)), None)

    def missing(self, form: Form) -> str | None:
        """Why a form is decoded to a dense matrix; None if there is something registered for it."""
        return None if self.every(form) else f"no {self.what} is registered for the form {form.name!r}: it runs decoded"
