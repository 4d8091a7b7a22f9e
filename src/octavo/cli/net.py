"""A last resort for commands: unexpected errors also become one line with their location."""

from __future__ import annotations

import errno
import traceback
from pathlib import Path

from octavo.errors import OctavoError
from octavo.system.version import __version__


def unforeseen(error: Exception) -> OctavoError | None:
    """The message for an exception from outside of Octavo; None if it is not a failure."""
    if isinstance(error, OSError) and error.errno == errno.EPIPE:
        # The reader of the output closed it.
        return None
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        where = error.filename or "standard output"
        return OctavoError(f"{where}: cannot be written: {error.strerror}; free some space, or write elsewhere")
    if isinstance(error, MemoryError):
        return OctavoError(f"out of memory ({error or 'MemoryError'}); use a machine with more, or a smaller source")
    own = Path(__file__).parents[1]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(own)]
    where = f"{Path(frames[-1].filename).relative_to(own.parent)}, line {frames[-1].lineno}" if frames else "octavo"
    return OctavoError(
        f"{where}: unforeseen {type(error).__name__}: {error}; this is a fault of Octavo {__version__}, please "
        "report it with the command"
    )
