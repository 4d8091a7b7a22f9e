"""JSON from files that anybody may have made: read only from ordinary files, bounded in size before it is parsed."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Never

from octavo.errors import ArtifactError, OctavoError

#: Bytes that Python takes at most for an object with its first key, and for a list or another value.
_OBJECT, _VALUE = 240, 64
#: Memory that any content may take once it is parsed: 64 MB.
_LEAST = 64 << 20


def read_object(file: Path, *, most: int, error: type[OctavoError] = ArtifactError) -> dict[str, Any]:
    """The object that a JSON file holds.

    Parameters
    ----------
    most
        Bytes that the file may have.
    error
        What is raised.

    Raises
    ------
    OctavoError
        If the file is none that can be read to its end, or holds no JSON object, or one too large.
    """
    return parse_object(read_plain(file, most=most, error=error), file, error=error)


def read_plain(file: Path, *, most: int, error: type[OctavoError] = ArtifactError) -> bytes:
    """The bytes of an ordinary file of at most ``most`` bytes. Devices and pipes, which may never end, are refused."""
    try:
        with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as opened:
            found = os.fstat(opened.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise error(f"{file}: is no ordinary file; put the file itself there")
            if found.st_size > most:
                raise error(f"{file}: {found.st_size} bytes are too many, at most {most} are read")
            return opened.read(most)
    except (OSError, ValueError) as reason:
        raise error(f"{file}: cannot be read: {getattr(reason, 'strerror', None) or reason}") from reason


def parse_object(
    content: bytes, file: Path, *, extra: int = 0, error: type[OctavoError] = ArtifactError
) -> dict[str, Any]:
    """The object that JSON text stands for, refused if it would take more memory than its size justifies.

    Parameters
    ----------
    file
        Where the text is from, for messages.
    extra
        Bytes of memory that it may take beyond 64 MB.
    """
    lists = content.count(b"[") + content.count(b",") + content.count(b":")
    memory = _OBJECT * content.count(b"{") + _VALUE * lists
    if memory > _LEAST + extra:
        raise error(f"{file}: takes about {memory} bytes of memory for {len(content)} bytes of JSON; refused")
    try:
        value = json.loads(content, object_pairs_hook=_unique, parse_constant=_refused)
    except (ValueError, RecursionError) as reason:
        raise error(f"{file}: not valid JSON: {reason}") from reason
    if not isinstance(value, dict):
        raise error(f"{file}: not a JSON object")
    return value


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object in which no name stands twice: two readers could each believe another one."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _refused(word: str) -> Never:
    raise ValueError(f"{word} is no JSON")
