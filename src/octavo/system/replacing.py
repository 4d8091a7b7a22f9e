"""What an output may replace: a regular file, or a folder that Octavo wrote, and only where that was asked for."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from octavo.errors import RequestError

#: Files of which one is in every folder that Octavo wrote: the manifest of an artifact, the job of a workspace.
OWN = ("octavo.json", "job.json")
_SPECIAL = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a symbolic link",
}


def check_file(path: str | Path, *, overwrite: bool, source: str | Path | None = None) -> Path:
    """The absolute path of a file that may be written, whose last part is not followed if it is a link.

    Parameters
    ----------
    source
        The file or folder that is being read: neither it nor anything in it is written.

    Raises
    ------
    RequestError
        If there is anything but a regular file, or one and ``overwrite`` is not set, or it is part of the source.
    """
    try:
        path = Path(path).parent.resolve() / Path(path).name
        whole = path.resolve()
        if source is not None and whole.is_relative_to(Path(source).resolve()):
            raise RequestError(f"{path}: is part of {source}, which is being read; name a file outside of it")
    except (OSError, RuntimeError) as error:
        raise RequestError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
    if check_kind(path) and not overwrite:
        raise RequestError(f"{path}: is already there; name another file, or give --overwrite to replace it")
    return path


def check_kind(path: Path) -> bool:
    """Whether there is a regular file; anything else there is refused by name."""
    kind = _kind(path)
    if kind == "a folder":
        raise RequestError(f"{path}: is a folder; name a file")
    if kind not in (None, "a file"):
        raise RequestError(f"{path}: is {kind}, which no output replaces; name a regular file, or a new one")
    return kind is not None


def check_is_folder(path: Path) -> bool:
    """Whether there is a folder; anything else there is refused by name."""
    # A link to a folder stays one: what is written is the folder that it leads to.
    kind = _kind(path.resolve() if path.is_dir() else path)
    if kind not in (None, "a folder"):
        raise RequestError(f"{path}: is {kind}; name a folder")
    return kind is not None


def check_folder(path: Path, *, overwrite: bool) -> None:
    """Refuse a folder to be written that is none, is in use, or, to be replaced, holds what is not Octavo's."""
    if not check_is_folder(path) or not any(path.iterdir()):
        return
    if not overwrite:
        raise RequestError(f"{path}: the folder is not empty; choose another, or give --overwrite to replace it")
    if not any((path / name).is_file() for name in OWN):
        raise RequestError(
            f"{path}: holds files that Octavo did not write (there is no {' or '.join(OWN)}), and --overwrite would "
            "remove them; choose another folder, or empty it yourself"
        )


def _kind(path: Path) -> str | None:
    """What there is under a name, links not followed; None for nothing."""
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise RequestError(f"{path}: cannot be written: {error.strerror or error}") from error
    if stat.S_ISDIR(mode):
        return "a folder"
    return _SPECIAL.get(stat.S_IFMT(mode), "a file")
