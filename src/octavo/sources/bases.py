"""Bases: models that others were tuned from, known by the content of their tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from octavo.errors import OctavoError, RequestError
from octavo.sources.files import from_path
from octavo.sources.modules import unwrapped
from octavo.sources.sentences import weight_folders
from octavo.sources.source import Source, examine, from_module
from octavo.sources.weight_files import weight_files
from octavo.system.paths import checked

#: Bases in folders that stay open, so that a second delta on one of them does not read it again.
_OPEN = 4


@dataclass(frozen=True)
class Base:
    """The tensors of a base under the names that a model tuned from it has for them.

    Parameters
    ----------
    source
        The base; its module is not needed.
    cut, put
        What the tuned model's names begin with, and what stands in its place in the base: ``bert.`` and nothing, if a
        model with a head was tuned from one without. Names that do not begin so are equal.
    """

    source: Source
    cut: str = ""
    put: str = ""

    def stored(self, name: str) -> str | None:
        """The base's tensor that a tensor of the tuned model was; None if it has none."""
        own = self.put + name.removeprefix(self.cut) if name.startswith(self.cut) else name
        own = self.source.aliases.get(own, own)
        return own if own in self.source.shapes else None

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor, by its name in the tuned model; None if the base lacks it."""
        own = self.stored(name)
        return None if own is None else self.source.shapes[own]

    def read(self, name: str) -> Tensor:
        """A tensor by its name in the tuned model, which the base must have."""
        own = self.stored(name)
        assert own is not None
        return self.source.read(own).detach()

    def digest(self, name: str) -> str:
        """SHA-256 of the content of a tensor, by its name in the tuned model; empty if the base lacks it."""
        own = self.stored(name)
        return "" if own is None else self.source.digests[own]

    def fingerprint(self, names: Iterable[str]) -> str:
        """SHA-256 over dtypes, shapes and contents of the tensors that the tuned model has under these names."""
        digest = hashlib.sha256()
        for name in sorted(names):
            own = self.stored(name)
            said = "missing" if own is None else f"{self.source.dtypes[own]} {self.source.shapes[own]}"
            digest.update(f"{name} {said} {self.digest(name)}\n".encode())
        return digest.hexdigest()


def open_base(given: Any) -> Source:
    """Open a base: a folder or file as :func:`octavo.compress` takes it, or a module in memory.

    Every tensor is read once. Folders and files that were not changed since are not read again.

    Raises
    ------
    RequestError
        If it cannot be opened.
    """
    if isinstance(given, Source):
        examine(given)
        return given
    if isinstance(given, nn.Module):
        source = from_module(unwrapped(given))
        examine(source)
        return source
    if not isinstance(given, str | Path):
        raise RequestError(f"base is {type(given).__name__}; give a model folder, a file of weights, or a module")
    path = checked(given).absolute()
    if not path.exists():
        raise RequestError(f"base {path}: no such file or folder; check the path")
    try:
        return _from_path(path, _seen(path))
    except OctavoError as error:
        raise RequestError(f"base {error}") from error


@lru_cache(maxsize=_OPEN)
def _from_path(path: Path, seen: tuple[tuple[str, int, int], ...]) -> Source:
    return from_path(path, module=False)


def _seen(path: Path) -> tuple[tuple[str, int, int], ...]:
    """The weight files of a path, with what reveals a change."""
    files = [path] if path.is_file() else [f for _, folder in weight_folders(path) for f in weight_files(folder).files]
    return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files))


def base_for(tuned: Source, given: Any) -> Base:
    """The base of a tuned model, with its names matched to the model's.

    Raises
    ------
    RequestError
        If it cannot be opened, or no tensor has the name and the shape of one of the tuned model's.
    """
    source = open_base(given)
    shapes = tuned.every_shape()
    cuts, puts = ({f"{name.partition('.')[0]}." for name in one} for one in (shapes, source.every_shape()))
    found = [Base(source), *(Base(source, cut=top) for top in cuts), *(Base(source, put=top) for top in puts)]

    def matches(base: Base) -> int:
        return sum(base.shape(name) == shape for name, shape in shapes.items())

    best = max(found, key=matches)
    if not matches(best):
        raise RequestError(
            f"{source.path or source.title}: has no tensor of the name and shape of one in {tuned.title}, such as "
            f"{next(iter(shapes))!r}; give the model that it was tuned from as base"
        )
    return best
