"""One registry for every kind of part: a decorator, a walk over its folder, and entry points of other packages."""

from __future__ import annotations

import importlib
import pkgutil
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from octavo.errors import RequestError
from octavo.system.notes import OctavoWarning
from octavo.system.visible import visible

T = TypeVar("T")

#: Names appear on command lines and in files, where ``,``, ``:`` and ``=`` are separators.
_NAME = re.compile(r"[a-z0-9]+([-_.][a-z0-9]+)*")


class Registry(Generic[T]):
    """Parts of one kind by name.

    Nothing is imported before the first lookup of a name that is not known yet. Then every module of ``package`` is
    imported, and every installed entry point of ``group``; each part registers itself while its module is imported.
    A name that is looked up never decides what is imported.

    Parameters
    ----------
    kind
        The kind of part in messages: ``method``.
    package
        The package whose modules are walked: ``octavo.methods``.
    group
        Entry point group of other packages; by default ``octavo.<kind>s``.

    Examples
    --------
    >>> colours = Registry[str]("colour", "octavo.system")
    >>> colours.add("dark-red", "#8b0000")
    >>> colours.get("dark-red")
    '#8b0000'
    """

    def __init__(self, kind: str, package: str, *, group: str | None = None) -> None:
        self.kind = kind
        self.package = package
        self.group = group or f"octavo.{kind}s"
        self._members: dict[str, T] = {}
        self._broken: list[str] = []
        self._walked = self._walking = False
        # Lookups in other threads wait for the walk; lookups by modules being imported do not.
        self._lock = threading.RLock()

    def add(self, name: str, member: T) -> None:
        """Register a part.

        Raises
        ------
        ValueError
            If the name is taken or cannot be written on a command line.
        """
        if _NAME.fullmatch(name) is None:
            raise ValueError(f"{self.kind} {name!r}: not a valid name; use small letters, digits and single hyphens")
        if name in self._members:
            taken = self._members[name]
            owner = f"{getattr(taken, '__module__', '')}.{getattr(taken, '__qualname__', type(taken).__qualname__)}"
            raise ValueError(f"{self.kind} {name!r} is already registered by {owner.strip('.')}; choose another name")
        self._members[name] = member

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers the decorated object."""

        def decorate(member: T) -> T:
            self.add(name, member)
            return member

        return decorate

    def get(self, name: str) -> T:
        """Return the part with that name.

        Raises
        ------
        RequestError
            If there is none; the message has the closest names.
        """
        if name not in self._members:
            self._walk()
        if name not in self._members:
            raise RequestError(self._unknown(name))
        return self._members[name]

    def names(self) -> list[str]:
        """All names, sorted."""
        self._walk()
        return sorted(self._members)

    def all(self) -> dict[str, T]:
        """All parts by name, sorted."""
        self._walk()
        return dict(sorted(self._members.items()))

    def __contains__(self, name: object) -> bool:
        if name not in self._members:
            self._walk()
        return name in self._members

    @contextmanager
    def temporary(self) -> Iterator[None]:
        """A context whose registrations are removed at its end; for examples and tests."""
        self._walk()
        before = dict(self._members)
        try:
            yield
        finally:
            self._members = before

    def _unknown(self, name: str) -> str:
        close = get_close_matches(name, self._members, n=3)
        guess = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
        choices = ", ".join(sorted(self._members)) or "none, for none is registered"
        broken = f" (not loaded: {'; '.join(self._broken)})" if self._broken else ""
        return f"{self.kind} {visible(repr(name))} is not known; {guess}choose from {choices}{broken}"

    def _walk(self) -> None:
        """Import everything once; parts of other packages that fail are left out with a warning."""
        if self._walked:
            return
        with self._lock:
            if self._walked or self._walking:
                return
            self._walking = True
            try:
                self._import_folder()
                broken = [text for entry in sorted(entry_points(group=self.group)) if (text := self._load(entry))]
            finally:
                self._walking = False
            self._broken, self._walked = broken, True
        for text in broken:
            warnings.warn(text, OctavoWarning, stacklevel=3)

    def _import_folder(self) -> None:
        package = importlib.import_module(self.package)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            with self._whole():
                importlib.import_module(module.name)

    def _load(self, entry: EntryPoint) -> str | None:
        """Load a part of another package; returns the error, if any."""
        try:
            with self._whole():
                entry.load()
        except (Exception, SystemExit) as error:  # a failing package must not affect other parts
            told = visible(f"{type(error).__name__}: {error}")
            return (
                f"{self.group}: {visible(entry.name)!r} ({visible(entry.value)}) cannot be loaded ({told}); update or "
                "remove its package"
            )
        return None

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Remove the parts that a module registered before it failed."""
        before = dict(self._members)
        try:
            yield
        except BaseException:
            self._members = before
            raise
