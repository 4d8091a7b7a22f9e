"""The folder of unfinished work, so that a killed run can be resumed.

A saved profile is such a folder too: ``octavo profile`` keeps it, ``octavo compress`` removes it when done. Every file
is written under a temporary name and renamed, so existing files are complete.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.artifact import Packed, StoredBytes
from octavo.calibration.calibrating import Calibration
from octavo.calibration.work_folder import SCRATCH, WorkFolder
from octavo.errors import RequestError
from octavo.sources.witness import Witness
from octavo.system.atomic import is_aside, sweep, write_file
from octavo.system.locks import INSIDE
from octavo.system.raw import raw_bytes
from octavo.system.replacing import check_is_folder
from octavo.system.sealed import JOB as _JOB
from octavo.system.sealed import digest, place_in, unsealed_json

_CALIBRATION, _PROFILE = "calibration.json", "profile.json"


class Workspace(WorkFolder):
    """A folder with the finished steps of one job.

    Parameters
    ----------
    path
        The folder; created if missing.
    job
        The identity of the job (source, data, methods) as plain JSON.
    resume
        Whether to use finished steps found in the folder. Otherwise they are removed.
    witness
        The input files of the work: nothing is kept of others.

    Raises
    ------
    RequestError
        If the folder cannot be written, holds other files, or holds another job's work and ``resume`` is set.
    """

    def __init__(
        self,
        path: Path,
        job: dict[str, Any],
        *,
        resume: bool,
        witness: Witness | None = None,
    ) -> None:
        super().__init__(path, witness or Witness(None))
        #: The folder of the whole job, of which this may be a part.
        self.root = path
        try:
            check_is_folder(path)
            names = {entry.name for entry in path.iterdir()} - {INSIDE} if path.exists() else set()
            if _JOB not in names and not all(map(is_aside, names)):
                # Removing it would delete the user's files.
                raise RequestError(f"{path}: is neither empty nor a work folder of Octavo; choose another folder")
            if names and not resume:
                self._spare_what_is_read()
                _empty(path)
            # Checked before the folder is created, so that a refusal leaves nothing behind.
            self.witness.check()
            path.mkdir(parents=True, exist_ok=True)
            found = self.read_json(_JOB)
            if found is None:
                self.write_json(_JOB, job)
            elif found != job:
                raise self._of_another(found, job)
            for folder in ("points", "curves"):
                (path / folder).mkdir(exist_ok=True)
            for left in path.glob(f"{SCRATCH}*"):
                shutil.rmtree(left, ignore_errors=True)
            sweep(path)
        except OSError as error:
            raise RequestError(f"{path}: cannot be written: {error.strerror or error}") from error

    def _spare_what_is_read(self) -> None:
        """Refuse to clear a folder that holds the source or its data."""
        for read in (self.witness.source, self.witness.data):
            if read is not None and read.resolve().is_relative_to(self.path.resolve()):
                raise RequestError(f"{self.path}: holds {read}, which would be removed; choose another folder")

    def _of_another(self, found: dict[str, Any], job: dict[str, Any]) -> RequestError:
        odd = sorted(key for key in {*found, *job} - {"files"} if found.get(key) != job.get(key))
        named = self.witness.changed(found.get("files", {}))
        named += [str(self.witness.source)] if "source" in odd and self.witness.source is not None else []
        named += [str(self.witness.data)] if "data" in odd and self.witness.data is not None else []
        since = f"; changed since then: {', '.join(named)}" if named else ""
        return RequestError(
            f"{self.path}: holds the work of another job (different: {', '.join(odd) or 'files'}){since}; repeat the "
            "earlier request, undo the changes, choose another folder, run without --resume to start over, or make the "
            "profile again"
        )

    def part(self, name: str, job: dict[str, Any]) -> Workspace:
        """The folder inside of this one for a part of its job, such as one level of a cut, with its finished steps."""
        made = Workspace(self.path / name, job, resume=True, witness=self.witness)
        made.root = self.root
        return made

    def save_calibration(self, calibration: Calibration) -> None:
        """Record that the evidence of all sites is complete, and its origin."""
        data = {key: getattr(calibration, key) for key in ("sequences", "tokens", "text", "warnings")}
        self.write_json(_CALIBRATION, data)

    def load_calibration(self) -> Calibration | None:
        """The kept calibration, or None; its evidence is read on demand."""
        data = self.read_json(_CALIBRATION, again=True)
        return None if data is None else Calibration(self.evidence, **data)

    def save_packed(self, site: str, method: str, setting: dict[str, Any], packed: Packed) -> Packed:
        """Keep an encoded form; returns a form whose content stays on disk."""
        head = {name: getattr(packed, name) for name in ("parts", "meta", "codecs", "resident", "crc")}
        text = json.dumps(head).encode()
        name = self._point(site, method, setting)
        # The head holds a separate checksum of the content.
        head_bytes = digest(place_in(self.path, name), text) + len(text).to_bytes(4, "little") + text
        path = self.path / name
        self.witness.check()
        # Not flushed to disk one by one: a form lost in a power cut is encoded again.
        write_file(path, head_bytes, packed.blob, flush=False)
        return replace(packed, content=StoredBytes(path, len(head_bytes), packed.bytes, packed.crc))

    def load_packed(self, site: str, method: str, setting: dict[str, Any]) -> Packed | None:
        """A kept encoded form, or None if it is missing or incomplete."""
        name = self._point(site, method, setting)
        path = self.path / name
        try:
            content = memoryview(path.read_bytes())
        except FileNotFoundError:
            return None
        split = 36 + int.from_bytes(content[32:36], "little")
        whole = len(content) >= split and content[:32] == digest(place_in(self.path, name), content[36:split])
        head = json.loads(bytes(content[36:split])) if whole else {}
        if not whole or zlib.crc32(content[split:]) != head["crc"]:
            self.note_damage(name)
            return None
        stored = StoredBytes(path, split, len(content) - split, head["crc"])
        return Packed(stored, head["parts"], head["meta"], head["codecs"], head["resident"])

    def _point(self, site: str, method: str, setting: dict[str, Any]) -> str:
        key = json.dumps([site, method, setting], sort_keys=True).encode()
        return f"points/{hashlib.sha256(key).hexdigest()[:32]}.bin"


def files_of(path: Path) -> dict[str, str] | None:
    """Checksums of the input files of kept work, or None if unknown."""
    try:
        return dict(unsealed_json(path, _JOB, (path / _JOB).read_bytes())["files"])
    except (OSError, ValueError, KeyError):
        return None


def forget(path: Path) -> None:
    """Remove a folder of unfinished work; other folders stay."""
    if holds_work(path):
        shutil.rmtree(path, ignore_errors=True)


def holds_work(path: Path) -> bool:
    """Whether the path is a folder of unfinished work or a profile."""
    return (path / _JOB).exists()


def holds_profile(path: Path, job: dict[str, Any]) -> bool:
    """Whether the path is a finished profile of a job."""
    try:
        return (path / _PROFILE).exists() and unsealed_json(path, _JOB, (path / _JOB).read_bytes()) == json.loads(
            json.dumps(job)
        )
    except (OSError, ValueError):
        return False  # a damaged folder is refused when it is opened


def _empty(path: Path) -> None:
    """Remove the content of a folder except this run's lock."""
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != INSIDE:
            entry.unlink()


def hash_tensors(batches: Any) -> str:
    """A digest of calibration batches: nested lists, tuples and mappings of tensors."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(raw_bytes(value if value.layout == torch.strided else value.to_dense()))
        elif isinstance(value, Mapping):
            for key in sorted(value, key=str):
                digest.update(str(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)

    add(batches)
    return digest.hexdigest()
