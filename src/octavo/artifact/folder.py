"""Check that an artifact's folder holds only regular files and folders, and no links out of it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from octavo.errors import ArtifactError
from octavo.system.paths import is_part

#: Largest number of entries in an artifact's folder, with sub-folders.
_MOST = 20_000


def check_folder(path: Path) -> None:
    """Refuse a folder with files that a loader could read forever, or that are stored elsewhere.

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
            raise ArtifactError(
                f"{path}: has more than {_MOST} files, too many for an artifact; name the artifact's folder"
            )
        for name, mode in entries:
            file = place / name
            if stat.S_ISLNK(mode) and not is_part(file, path):
                raise ArtifactError(f"{file}: is a link out of the artifact; replace it by the file")
            if stat.S_ISDIR(mode):
                # Hidden folders at the top level belong to other tools; a list of modules may not name them.
                todo += [] if place == path and name.startswith(".") else [file]
            elif not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
                raise ArtifactError(f"{file}: is not a regular file; artifacts have only regular files, so remove it")
