"""JSON from untrusted files: read only from regular files, with its size bounded before parsing."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Never

from octavo.errors import ArtifactError, OctavoError

#: Upper bound of Python's memory in bytes for an object with its first key, and for a list or another value.
_OBJECT, _VALUE = 240, 64
#: Memory that any content may take when parsed: 64 MB.
_LEAST = 64 << 20


def read_object(file: Path, *, most: int, error: type[OctavoError] = ArtifactError) -> dict[str, Any]:
    """Read a JSON object from a file.

    Parameters
    ----------
    most
        Largest size of the file in bytes.
    error
        The exception class to raise.

    Raises
    ------
    OctavoError
        If the file cannot be read to its end, or holds no JSON object, or one that is too large.
    """
    return parse_object(read_plain(file, most=most, error=error), file, error=error)


def read_plain(file: Path, *, most: int, error: type[OctavoError] = ArtifactError) -> bytes:
    """The bytes of a regular file of at most ``most`` bytes. Devices and pipes are refused, as they may never end."""
    try:
        with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as opened:
            found = os.fstat(opened.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise error(f"{file}: is not a regular file; put the file itself there")
            if found.st_size > most:
                raise error(f"{file}: too large ({found.st_size} bytes); at most {most} bytes are read")
            return opened.read(most)
    except (OSError, ValueError) as reason:
        raise error(f"{file}: cannot be read: {getattr(reason, 'strerror', None) or reason}") from reason


def parse_object(
    content: bytes, file: Path, *, extra: int = 0, error: type[OctavoError] = ArtifactError
) -> dict[str, Any]:
    """Parse a JSON object; it is refused if it needs more memory than its size justifies.

    Parameters
    ----------
    file
        Where the text is from, for messages.
    extra
        Bytes of memory allowed beyond 64 MB.
    """
    lists = content.count(b"[") + content.count(b",") + content.count(b":")
    memory = _OBJECT * content.count(b"{") + _VALUE * lists
    if memory > _LEAST + extra:
        raise error(f"{file}: refused, as {len(content)} bytes of JSON would take about {memory} bytes of memory")
    try:
        value = json.loads(content, object_pairs_hook=_unique, parse_constant=_refused)
    except (ValueError, RecursionError) as reason:
        raise error(f"{file}: not valid JSON: {reason}") from reason
    if not isinstance(value, dict):
        raise error(f"{file}: not a JSON object")
    return value


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object without duplicate names, since two readers could each use a different one."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a duplicate name")
    return found


def _refused(word: str) -> Never:
    raise ValueError(f"{word} is not valid JSON")
