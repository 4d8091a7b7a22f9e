"""Writing files and folders whole or not at all: aside first, flushed to the disk, then renamed into place.

What is being written has the name ``.NAME.octavo-new.XXXX`` beside its place. A run that is killed leaves it there, and
the next one removes it: see :func:`tidy` and :func:`sweep`.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from octavo.errors import OctavoError
from octavo.system.paths import reason
from octavo.system.replacing import check_kind

#: What the names of files and folders go on with that are being written, and of folders that make room for new ones.
NEW, OLD = ".octavo-new.", ".octavo-old."
#: Suffix of files that test whether a file system is writable.
TRIED = ".octavo-tried."
#: What a file system says that cannot flush a folder.
_NO_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}


def write_file(path: Path, *content: bytes, flush: bool = True) -> None:
    """Write a file, whole or not at all.

    Parameters
    ----------
    path
        The file; one that is there is replaced.
    content
        What it will hold, one part after the other.
    flush
        Whether it must outlive a power cut. Without it the file may be empty after one.

    Raises
    ------
    RequestError
        If what is at ``path`` is not a regular file.
    OctavoError
        If it cannot be written; what was there is as it was.
    """
    with writing(path, flush=flush) as aside, open(aside, "wb") as file:
        file.writelines(content)


@contextmanager
def writing(path: Path, *, flush: bool = True) -> Iterator[Path]:
    """A name beside ``path`` to write a file under, which is put in its place if the body does not raise.

    Parameters and errors are those of :func:`write_file`. The body must close what it opens.
    """
    check_kind(path)
    aside = path.with_name(f".{path.name}{NEW}{secrets.token_hex(4)}")
    try:
        yield aside
        if flush:
            _flush(aside)
        check_kind(path)
        os.replace(aside, path)
        if flush:
            _flush(path.parent)
    except (OSError, SafetensorError) as error:
        raise OctavoError(f"{path}: cannot be written: {reason(error)}") from error
    finally:
        # Whatever stopped it, an interruption included, nothing is left; after the renaming there is nothing.
        with suppress(OSError):
            aside.unlink()


def made_aside(path: Path) -> Path:
    """A new folder next to the output, in which it is written; the next run removes it if this one is killed.

    Raises
    ------
    OctavoError
        If it cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{path.name}{NEW}", dir=path.parent))
    except OSError as error:
        raise OctavoError(f"{path}: cannot be written: {reason(error)}; nothing was left there") from error


def move_into_place(aside: Path, path: Path) -> None:
    """Flush a finished folder, and rename it into place; an old one is moved out of the way first and removed last.

    Raises
    ------
    OSError
        If it cannot be; the old one is then where it was.
    """
    os.chmod(aside, 0o755)
    _flush_all(aside)
    if not path.exists():
        os.replace(aside, path)
        _flush(path.parent)
        return
    with tempfile.TemporaryDirectory(prefix=f".{path.name}{OLD}", dir=path.parent, ignore_cleanup_errors=True) as old:
        os.replace(path, Path(old) / "folder")
        try:
            os.replace(aside, path)
        except OSError:
            os.replace(Path(old) / "folder", path)
            raise
        # The new one must be there for good before the old one goes.
        _flush(path.parent)


def tidy(path: Path) -> None:
    """Put right what a run left beside ``path`` that was killed while it wrote: half of an output, or the old one."""
    if not path.parent.is_dir():
        return
    for entry in path.parent.iterdir():
        if entry.name.startswith(f".{path.name}{OLD}"):
            if not path.exists() and (entry / "folder").exists():
                os.replace(entry / "folder", path)
            _remove(entry)
        elif entry.name.startswith((f".{path.name}{NEW}", f".{path.name}{TRIED}")):
            _remove(entry)


def sweep(folder: Path) -> None:
    """Remove all halves of files that a killed run left in a folder and those in it."""
    for entry in folder.rglob(f".*{NEW}*"):
        _remove(entry)


def is_aside(name: str) -> bool:
    """Whether this is the name of something that was being written."""
    return name.startswith(".") and NEW in name


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        with suppress(OSError):
            entry.unlink()


def _flush_all(folder: Path) -> None:
    """Flush the files of a folder, then the folders, those inside first."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            _flush(Path(place) / name)
        _flush(Path(place))


def _flush(path: Path) -> None:
    """Wait until the disk holds a file's content, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FLUSH or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
