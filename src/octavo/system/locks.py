"""A lock that allows one run at a time in a folder; the system releases it whenever its process ends."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import ClassVar

from octavo.errors import RequestError
from octavo.system.paths import checked_output

#: Name of the lock file if the folder is writable but its parent is not.
INSIDE = ".octavo-lock"
#: Errors of file systems without locks: there the run continues unlocked.
_WITHOUT = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}


@dataclass
class _Held:
    """A lock held by this process."""

    descriptor: int
    thread: int
    #: Folders created for the lock file, innermost first.
    made: list[Path]
    count: int = 1


class Lock:
    """The exclusive right to write a folder, held until :meth:`release`; also a context manager.

    The system locks a file next to the folder, ``.NAME.octavo-lock``. A lock file left by a killed process is unlocked
    and reused. The thread that holds a lock may take it again.

    Parameters
    ----------
    folder
        The folder, which need not exist.

    Raises
    ------
    RequestError
        If another run holds it (the error names its process), or if the lock file cannot be written.
    """

    _held: ClassVar[dict[Path, _Held]] = {}
    _guard: ClassVar[threading.RLock] = threading.RLock()

    def __init__(self, folder: str | Path) -> None:
        self.folder = checked_output(folder).resolve()
        self.file = self.folder.parent / f".{self.folder.name}.octavo-lock"
        if self.folder.is_dir() and not os.access(self.folder.parent, os.W_OK):
            self.file = self.folder / INSIDE
        self._released = False
        with self._guard:
            held = self._held.get(self.file)
            if held is not None and held.thread == threading.get_ident():
                held.count += 1
                return
            made = [path for path in self.file.parents if not path.exists()]
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                self._held[self.file] = _Held(self._acquired(), threading.get_ident(), made)
            except OSError as error:
                raise RequestError(f"{self.folder}: cannot be written: {error.strerror or error}") from error

    def _acquired(self) -> int:
        while True:
            descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The previous holder may have removed the file in between: then this lock protects nothing.
                if os.fstat(descriptor).st_ino == os.stat(self.file).st_ino:
                    os.truncate(descriptor, 0)
                    os.write(descriptor, f"{os.getpid()} ({' '.join(sys.argv)[:200]})".encode(errors="replace"))
                    return descriptor
            except BlockingIOError:
                holder = os.read(descriptor, 1000).decode(errors="replace") or "that is starting"
                os.close(descriptor)
                raise RequestError(
                    f"{self.folder}: is in use by another run, process {holder}; wait until it is done, or choose "
                    "another folder"
                ) from None
            except FileNotFoundError:
                pass
            except OSError as error:
                if error.errno in _WITHOUT:
                    return descriptor
                os.close(descriptor)
                raise
            os.close(descriptor)

    def release(self) -> None:
        """Release the lock; calling this twice is harmless."""
        with self._guard:
            held = self._held.get(self.file)
            if self._released or held is None:
                return
            self._released = True
            held.count -= 1
            if held.count:
                return
            del self._held[self.file]
            # Removed while locked, so that no other process can hold it.
            with suppress(OSError):
                self.file.unlink()
            os.close(held.descriptor)
            for folder in held.made:
                # A folder that is not empty stays.
                with suppress(OSError):
                    folder.rmdir()

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @classmethod
    def _forget(cls) -> None:
        """In a forked child: the locks belong to the parent and must not outlive it here."""
        for held in cls._held.values():
            os.close(held.descriptor)
        cls._held.clear()


os.register_at_fork(after_in_child=Lock._forget)
