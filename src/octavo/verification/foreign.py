"""Folders whose files are another runtime's: what was written, recorded beside it, and checked again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from octavo.errors import ArtifactError
from octavo.system.atomic import write_file
from octavo.system.replacing import FOREIGN
from octavo.system.strict_json import read_object
from octavo.verification.recorded import recorded_beside
from octavo.verification.verified import Verified

_PIECE = 1 << 22
#: Largest size of a record in bytes; one entry takes about 150.
_MOST = 1 << 20


def record(folder: Path, target: str, files: Mapping[str, int], original: int, tensors: int) -> None:
    """Write checksums of files (bytes by relative path) into their folder.

    Parameters
    ----------
    target
        The target that wrote them.
    original
        Bytes of the source.
    tensors
        Number of tensors that they hold.
    """
    found = {name: {"bytes": size, "sha256": _digest(folder / name)} for name, size in files.items()}
    content = {"target": target, "original_bytes": original, "tensors": tensors, "files": found}
    write_file(folder / FOREIGN, json.dumps(content, indent=1).encode())


def is_foreign(path: str | Path) -> bool:
    """Whether a folder holds another runtime's files, written by Octavo."""
    return (Path(path) / FOREIGN).is_file()


def verify_foreign(path: str | Path) -> Verified:
    """Check the files of a folder against their recorded checksums.

    Raises
    ------
    ArtifactError
        If one is missing or was changed, or the record cannot be read.
    """
    folder = Path(path)
    try:
        saved = read_object(folder / FOREIGN, most=_MOST)
    except ArtifactError as error:
        raise ArtifactError(f"{error}; copy the folder again") from error
    try:
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in saved["files"].items()}
        original, tensors = int(saved["original_bytes"]), int(saved["tensors"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{folder / FOREIGN}: cannot be read: {error}; copy the folder again") from error
    total = hashlib.sha256()
    for name, (size, wanted) in files.items():
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()) or not file.is_file():
            raise ArtifactError(f"{path}: {name} is missing; copy the folder again")
        if file.stat().st_size != size or _digest(file) != wanted:
            raise ArtifactError(f"{path}: {name} was changed since it was written; copy the folder again")
        total.update(wanted.encode())
    length = sum(size for size, _ in files.values())
    return Verified(
        path=str(path),
        bytes=length,
        ratio=original / max(length, 1),
        tensors=tensors,
        weights_sha256=total.hexdigest(),
        weights_match=True,
        quality=recorded_beside(folder).quality,
    )


def _digest(file: Path) -> str:
    total = hashlib.sha256()
    with open(file, "rb") as content:
        while piece := content.read(_PIECE):
            total.update(piece)
    return total.hexdigest()
