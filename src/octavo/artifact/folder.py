"""What lies in an artifact's folder: ordinary files and folders, and no links out of it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from octavo.errors import ArtifactError
from octavo.system.paths import is_part

#: Entries in an artifact's folder and in all below it.
_MOST = 20_000


def check_folder(path: Path) -> None:
    """Refuse a folder with anything that a loader could read without end, or that lies elsewhere.

    Raises
    ------
    ArtifactError
        If there is a device, a pipe, a socket, or a link that leads out of the folder.
    """
    left = _MOST
    todo = [path]
    while todo:
        place = todo.pop()
        try:
            entries = [(entry.name, entry.stat(follow_symlinks=False).st_mode) for entry in os.scandir(place)]
        except OSError as error:
            raise ArtifactError(f"{place}: cannot be read: {error.strerror or error}") from error
        left -= len(entries)
        if left < 0:
            raise ArtifactError(f"{path}: has more than {_MOST} files; an artifact has few")
        for name, mode in entries:
            file = place / name
            if stat.S_ISLNK(mode) and not is_part(file, path):
                raise ArtifactError(f"{file}: is a link out of the artifact; put the file itself there")
            if stat.S_ISDIR(mode):
                # Hidden folders at the top are those of other tools; no list of modules may name them.
                todo += [] if place == path and name.startswith(".") else [file]
            elif not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
                raise ArtifactError(f"{file}: is no ordinary file; an artifact has none like it, remove it")
