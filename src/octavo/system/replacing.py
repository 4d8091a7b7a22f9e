"""Rules for replacing outputs: only regular files and folders written by Octavo, and only on request."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from octavo.errors import RequestError
from octavo.system.sealed import JOB

#: The file of an artifact that says how to read the others.
MANIFEST = "octavo.json"
#: The file beside those of another runtime that says what Octavo wrote.
FOREIGN = "octavo-files.json"
#: Every folder written by Octavo has one of these: the manifest of an artifact, that record, or the job of a workspace.
OWN = (MANIFEST, FOREIGN, JOB)
_SPECIAL = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a symbolic link",
}


def check_file(path: str | Path, *, overwrite: bool, source: str | Path | None = None) -> Path:
    """The absolute path of a file that may be written; a link as its last part is not followed.

    Parameters
    ----------
    source
        The file or folder being read: neither it nor anything in it may be written.

    Raises
    ------
    RequestError
        If something other than a regular file is there, or a file without ``overwrite``, or it is part of the source.
    """
    try:
        path = Path(path).parent.resolve() / Path(path).name
        whole = path.resolve()
        if source is not None and whole.is_relative_to(Path(source).resolve()):
            raise RequestError(f"{path}: is part of the source {source}; name a file outside of it")
    except (OSError, RuntimeError) as error:
        raise RequestError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
    if check_kind(path) and not overwrite:
        raise RequestError(f"{path}: already exists; name another file, or give --overwrite to replace it")
    return path


def check_kind(path: Path) -> bool:
    """Whether a regular file exists; anything else there is refused."""
    kind = _kind(path)
    if kind == "a folder":
        raise RequestError(f"{path}: is a folder; name a file")
    if kind not in (None, "a file"):
        raise RequestError(f"{path}: is {kind}, which is never replaced; name a regular file, or a new one")
    return kind is not None


def check_is_folder(path: Path) -> bool:
    """Whether a folder exists; anything else there is refused."""
    # A link to a folder stays a link: the folder that it points to is written.
    kind = _kind(path.resolve() if path.is_dir() else path)
    if kind not in (None, "a folder"):
        raise RequestError(f"{path}: is {kind}, not a folder; name a folder")
    return kind is not None


def check_folder(path: Path, *, overwrite: bool) -> None:
    """Refuse an output path that is not a folder, is not empty, or, if replaced, holds files of others."""
    if not check_is_folder(path) or not any(path.iterdir()):
        return
    if not overwrite:
        raise RequestError(f"{path}: the folder is not empty; choose another, or give --overwrite to replace it")
    if not any((path / name).is_file() for name in OWN):
        raise RequestError(
            f"{path}: holds files that Octavo did not write (it has no {' or '.join(OWN)}), and --overwrite would "
            "remove them; choose another folder, or empty it yourself"
        )


def _kind(path: Path) -> str | None:
    """The status of a path without following links; None if it does not exist."""
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise RequestError(f"{path}: cannot be written: {error.strerror or error}") from error
    if stat.S_ISDIR(mode):
        return "a folder"
    return _SPECIAL.get(stat.S_IFMT(mode), "a file")
