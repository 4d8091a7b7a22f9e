"""Writing files atomically."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from octavo.errors import OctavoError
from octavo.system.replacing import check_kind


def write_file(path: Path, *content: bytes, flush: bool = True) -> None:
    """Write a file under a temporary name, flush it to disk, and rename it."""
    check_kind(path)
    aside = path.with_name(path.name + ".part")
    check_kind(aside)
    try:
        with open(aside, "wb") as file:
            file.writelines(content)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise OctavoError(f"{path}: cannot be written: {error.strerror or error}") from error
