"""Detects changes of the files that a run reads."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from octavo.errors import OctavoError, RequestError
from octavo.sources.companions import companion_files
from octavo.sources.media import media_files
from octavo.sources.sentences import transformer_folder, weight_folders
from octavo.sources.weight_files import weight_files

_Seen = tuple[int, int, int, int]


class Witness:
    """Files of a source and of data, as first seen.

    Parameters
    ----------
    source
        The file or folder to compress; None for a source in memory.
    data
        The file or folder of calibration data; anything that is not a path is ignored.
    """

    def __init__(self, source: Path | None, data: Any = None) -> None:
        self.source = None if source is None else Path(os.path.abspath(source))
        self.data = Path(os.path.abspath(data)) if isinstance(data, str | Path) else None
        self._seen: dict[Path, _Seen] = {}
        self._digests: dict[Path, str] = {}
        for file, is_weights in self._files().items():
            seen = _look(file)
            if seen is not None:
                self._seen[file] = seen
            # A pipe can only be read once, so it is skipped here.
            if seen is not None and not is_weights and file.is_file():
                self._digests[file] = _digest(file)

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of every file of the source by name, except weights, which are identified by their tensors."""
        return {self._name(file): digest for file, digest in sorted(self._digests.items()) if file != self.data}

    @property
    def beside(self) -> int:
        """Bytes of the files of the source that hold no weights."""
        return sum(self._seen[file][0] for file in self._digests if file != self.data)

    def check(self, *, every: bool = False) -> None:
        """Refuse to continue with changed files.

        Parameters
        ----------
        every
            Whether to look for new files too.

        Raises
        ------
        RequestError
            If a file was changed, removed or added since the run began; the error names the first.
        """
        now = {file: _look(file) for file in (self._files() if every else self._seen)}
        for file in dict.fromkeys([*self._seen, *now]):
            before, found = self._seen.get(file), now.get(file)
            if before == found:
                continue
            if found is not None and file in self._digests and _digest(file) == self._digests[file]:
                # Touched, or rewritten with the same content.
                self._seen[file] = found
                continue
            what = "removed" if found is None else "added" if before is None else "changed"
            raise RequestError(
                f"{file}: was {what} since the run began, so the result would mix two versions; do not change the "
                "source or its data during a run, and start again"
            )

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """A context for reading files: if reading fails because they were changed, the error says so."""
        try:
            yield
        except Exception:
            # Third-party readers may raise any exception when a file changes while they read it.
            self.check(every=True)
            raise

    def changed(self, before: dict[str, str]) -> list[str]:
        """Names of files that differ from an earlier run with the given :attr:`digests`."""
        now = self.digests
        return sorted(name for name in {*now, *before} if now.get(name) != before.get(name))

    def _name(self, file: Path) -> str:
        assert self.source is not None
        return os.path.relpath(file, self.source if self.source.is_dir() else self.source.parent)

    def _files(self) -> dict[Path, bool]:
        """The files that a run reads, and whether each holds weights or media, which are known by their content."""
        found: dict[Path, bool] = {} if self.data is None else {self.data: False}
        if self.data is not None and self.data.is_dir():
            # Their content is part of the batches.
            found = dict.fromkeys(media_files(self.data), True)
        if self.source is None:
            return found
        if self.source.is_dir():
            configs = {self.source / "config.json", transformer_folder(self.source) / "config.json"}
            found.update((self.source / file, False) for file in companion_files(self.source))
            found.update((file, False) for file in configs if file.is_file())
            found.update((file, True) for file in self.source.glob("*.gguf"))
        try:
            for _, folder in weight_folders(self.source):
                weights = weight_files(folder)
                found.update((file, True) for file in weights.files)
                found.update({weights.index: False} if weights.index else {})
        except (OctavoError, OSError):
            # Opening the source reports what is wrong with it.
            found.update({self.source: True} if self.source.is_file() else {})
        return found


def _look(file: Path) -> _Seen | None:
    """The file attributes that reveal a change, or None if the file does not exist."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev


def _digest(file: Path) -> str:
    try:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError:
        return ""
