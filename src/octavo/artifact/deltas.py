"""Artifacts of deltas: what a manifest says of the base, and where the base is looked for.

A manifest names its base by a title and a fingerprint of content, never by a place: an untrusted artifact may not
say what else is read. The base is what the caller gives, or what lies under that title where the user said, or beside
the artifact; and it is used only if its tensors have the fingerprint.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from octavo.artifact.packing import DTYPES, dtype_name
from octavo.errors import ArtifactError, RequestError
from octavo.sources.bases import Base, open_base
from octavo.sources.differences import Difference

#: Environment variable: bases, or folders of bases, separated like those of PATH.
VARIABLE = "OCTAVO_BASE"
_KEYS = {"title", "fingerprint", "dtype", "names", "whole"}
#: The base that a caller gave.
_GIVEN: ContextVar[Any] = ContextVar("octavo_base", default=None)


@dataclass(frozen=True)
class Delta:
    """What an artifact says of the base that it is a delta of.

    Parameters
    ----------
    title, fingerprint
        The base's name, and the fingerprint of the tensors of it that the tuned model rests on.
    dtype
        The dtype of the tuned tensors of which differences are stored.
    cut, put
        How names differ, as for :class:`octavo.sources.bases.Base`.
    whole
        Stored tensors that are no differences.
    same
        Tensors that are not stored, since they are the base's.
    """

    title: str
    fingerprint: str
    dtype: torch.dtype
    cut: str = ""
    put: str = ""
    whole: Sequence[str] = ()
    same: Sequence[str] = ()

    @classmethod
    def of(cls, source: Difference) -> Delta:
        """What the artifact of a difference says."""
        base = source.base
        return cls(
            base.source.title, source.base_fingerprint(), source.dtype, base.cut, base.put, source.whole, source.same
        )

    def describe(self) -> dict[str, Any]:
        """The manifest entry. The names of :attr:`same` are in the files."""
        return {
            "title": self.title,
            "fingerprint": self.fingerprint,
            "dtype": dtype_name(self.dtype),
            "names": [self.cut, self.put],
            "whole": list(self.whole),
        }

    @classmethod
    def read(cls, entry: Any, same: Sequence[str]) -> Delta:
        """Inverse of :meth:`describe`.

        Raises
        ------
        ArtifactError
            If the entry is malformed.
        """
        if not isinstance(entry, Mapping) or set(entry) != _KEYS:
            raise ArtifactError("the manifest's entry of the base is malformed; copy the artifact again")
        words = [entry["title"], entry["fingerprint"], entry["dtype"]]
        lists = [entry["names"], entry["whole"]]
        fine = all(isinstance(item, list) and all(isinstance(word, str) for word in item) for item in lists)
        if not fine or len(entry["names"]) != 2 or not all(isinstance(word, str) for word in words):
            raise ArtifactError("the manifest's entry of the base is malformed; copy the artifact again")
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None or not dtype.is_floating_point:
            raise ArtifactError(f"the manifest says that the base was tuned in {entry['dtype']!r}, which is no float")
        title, fingerprint, _ = words
        cut, put = entry["names"]
        return cls(title, fingerprint, dtype, cut, put, tuple(entry["whole"]), tuple(same))


@contextmanager
def on_base(given: Any) -> Iterator[None]:
    """A context in which deltas rest on a base that the caller gives; None changes nothing.

    Parameters
    ----------
    given
        As for :func:`octavo.sources.bases.open_base`.
    """
    if given is None:
        yield
        return
    token = _GIVEN.set(given)
    try:
        yield
    finally:
        _GIVEN.reset(token)


def find_base(path: Path, delta: Delta, rests: Sequence[str]) -> Base:
    """The base of a delta: the given one, one of :data:`VARIABLE`, or the folder of its title beside the artifact.

    Parameters
    ----------
    rests
        The tensors that rest on the base.

    Raises
    ------
    ArtifactError
        If there is none, or it is another model.
    """
    given = _GIVEN.get()
    candidates = [given] if given is not None else list(_places(path, delta.title))
    wrong = []
    for candidate in candidates:
        try:
            base = Base(open_base(candidate), delta.cut, delta.put)
        except RequestError as error:
            raise ArtifactError(f"{path}: {error}") from error
        if base.fingerprint(rests) == delta.fingerprint:
            return base
        lacking = next((name for name in rests if base.shape(name) is None), None)
        why = "its weights are others" if lacking is None else f"it has no tensor for {lacking!r}"
        wrong.append(f"{base.source.path or base.source.title} is another model ({why})")
    said = wrong[0] if wrong else "its base was not found"
    raise ArtifactError(
        f"{path}: is a delta of {delta.title!r}, and {said}; give the base that it was made from with base=, or in the "
        f"environment variable {VARIABLE}"
    )


def _places(path: Path, title: str) -> Iterator[Path]:
    """Where a base may lie."""
    # A title of an untrusted manifest may not lead out of the folders that the user named.
    named = title not in ("", ".", "..") and not {"/", "\\", "\0"} & set(title)
    for word in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        place = Path(word)
        yield place / title if named and (place / title).exists() else place
    beside = path.absolute().parent / title
    if named and beside.exists():
        yield beside
