"""Checks of the paths that a user gives."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from octavo.errors import RequestError

#: The longest file name, in bytes, on common file systems.
_LONGEST = 255
#: Temporary names next to an output are at most this many bytes longer.
_BESIDE = 32


def checked(path: str | os.PathLike[str]) -> Path:
    """A path that the system can look up, whether or not it exists.

    Raises
    ------
    RequestError
        If it is empty, contains a NUL character, is too long, is a loop of links, or is in an unreadable folder.
    """
    text = os.fspath(path)
    if not text:
        raise RequestError("a path is empty (''); name a file or folder")
    try:
        os.stat(text)
    except ValueError as error:
        raise RequestError(f"{text!r}: is not a path ({error}); name a file or folder") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise RequestError(
                f"{text}: is a link that leads back to itself; name the file or folder that it should point to"
            ) from error
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise RequestError(f"{_short(text)}: cannot be looked up: {error.strerror}; name another path") from error
    return Path(text)


def checked_output(path: str | os.PathLike[str]) -> Path:
    """A path next to which temporary files with longer names can be written.

    Raises
    ------
    RequestError
        As :func:`checked`, and if the names beside it would be too long.
    """
    path = checked(path)
    for part in path.parts:
        room = _LONGEST - (_BESIDE if part == path.name else 0)
        if len(os.fsencode(part)) > room:
            raise RequestError(
                f"{_short(str(path))}: a part of the path is longer than {room} bytes; choose a shorter name"
            )
    return path


def reason(error: Exception) -> str:
    """Why a file could not be read, without its name and the system's number for it."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:60]}…{text[-40:]}"


def is_part(file: Path, folder: Path) -> bool:
    """Whether a link points to a regular file in ``folder`` or in the hub cache of the folder."""
    try:
        target, folder = file.resolve(strict=True), folder.resolve()
    except (OSError, RuntimeError):
        return False
    blobs = folder.parents[1] / "blobs" if folder.parent.name == "snapshots" else None
    within = target.is_relative_to(folder) or (blobs is not None and target.is_relative_to(blobs))
    return within and target.is_file()
