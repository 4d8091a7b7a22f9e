"""The last net under the commands: an error that nobody foresaw is one line too, that says where it happened."""

from __future__ import annotations

import errno
import traceback
from pathlib import Path

from octavo.errors import OctavoError
from octavo.system.version import __version__


def unforeseen(error: Exception) -> OctavoError | None:
    """What to say of an exception that is none of Octavo's; None if it is no failure of a command."""
    if isinstance(error, OSError) and error.errno == errno.EPIPE:
        # Whoever reads the output has read enough.
        return None
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        where = error.filename or "what is printed"
        return OctavoError(f"{where}: cannot be written: {error.strerror}; make room there, or write elsewhere")
    if isinstance(error, MemoryError):
        return OctavoError(f"memory ran out ({error or 'MemoryError'}); give the run more, or a smaller source")
    own = Path(__file__).parents[1]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(own)]
    where = f"{Path(frames[-1].filename).relative_to(own.parent)}, line {frames[-1].lineno}" if frames else "octavo"
    return OctavoError(
        f"{where}: unforeseen {type(error).__name__}: {error}; this is a fault of Octavo {__version__}, please "
        "report it with the command"
    )
