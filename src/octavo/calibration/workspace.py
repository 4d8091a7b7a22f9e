"""The folder in which unfinished work is kept, so that a killed run continues where it was.

A saved profile is such a folder too: ``octavo profile`` leaves it, ``octavo compress`` removes it when it is done.
Every file is written aside and renamed, so a file that is there is whole.
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

from octavo.artifact import Packed, Stored
from octavo.calibration.calibrating import Calibration
from octavo.calibration.evidence_folder import EvidenceFolder
from octavo.calibration.witness import Witness
from octavo.errors import RequestError
from octavo.system.atomic import is_aside, sweep, write_file
from octavo.system.locks import INSIDE
from octavo.system.raw import raw_bytes
from octavo.system.replacing import check_is_folder
from octavo.system.sealed import JOB as _JOB
from octavo.system.sealed import digest, place_in, sealed_json, unsealed_json

_CALIBRATION, _PROFILE = "calibration.json", "profile.json"
#: What the names of folders begin with that are needed while a run goes on, and swept by the next.
SCRATCH = "octavo-states-"


class Workspace:
    """A folder of finished steps of one job.

    Parameters
    ----------
    path
        The folder; made if it is not there.
    job
        What makes this job itself: source, data, methods. Plain JSON.
    resume
        Whether finished steps found in the folder may be used. Without it they are removed.
    witness
        The files that the work is made from: nothing is kept of others.

    Raises
    ------
    RequestError
        If the folder holds another job's work and ``resume`` is set, or anything else, or cannot be written.
    """

    def __init__(
        self,
        path: Path,
        job: dict[str, Any],
        *,
        resume: bool,
        witness: Witness | None = None,
    ) -> None:
        self.path, self.witness = path, witness or Witness(None)
        #: Notes on pieces that were damaged, and are made again.
        self.damaged: list[str] = []
        try:
            check_is_folder(path)
            names = {entry.name for entry in path.iterdir()} - {INSIDE} if path.exists() else set()
            if _JOB not in names and not all(map(is_aside, names)):
                # Removing it would remove somebody's files.
                raise RequestError(f"{path}: is neither empty nor a folder of Octavo's own work; name another folder")
            if names and not resume:
                self._spare_what_is_read()
                _empty(path)
            # Before there is a folder that a refusal would leave behind.
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
        """Refuse to empty a folder that holds the source or its data."""
        for read in (self.witness.source, self.witness.data):
            if read is not None and read.resolve().is_relative_to(self.path.resolve()):
                raise RequestError(f"{self.path}: holds {read}, which would be removed; name another folder")

    def _of_another(self, found: dict[str, Any], job: dict[str, Any]) -> RequestError:
        odd = sorted(key for key in {*found, *job} - {"files"} if found.get(key) != job.get(key))
        named = self.witness.changed(found.get("files", {}))
        named += [str(self.witness.source)] if "source" in odd and self.witness.source is not None else []
        named += [str(self.witness.data)] if "data" in odd and self.witness.data is not None else []
        since = f"; changed since then: {', '.join(named)}" if named else ""
        return RequestError(
            f"{self.path}: holds the work of another job (different: {', '.join(odd) or 'files'}){since}; "
            "ask for the same as then, put back what was changed, name another folder, or run without --resume to "
            "begin anew"
        )

    def read_json(self, name: str, *, again: bool = False) -> dict[str, Any] | None:
        """What was written under that name, or None.

        Parameters
        ----------
        again
            Whether what is damaged can be made again: it is then None as well, and a note says so.

        Raises
        ------
        RequestError
            If it is damaged, and cannot be made again.
        """
        try:
            return unsealed_json(self.path, name, (self.path / name).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            if again:
                self._note(name)
                return None
            raise RequestError(f"{self.path / name}: damaged: {error}; remove {self.path} and start again") from error

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Write JSON, whole or not at all."""
        self.witness.check()
        write_file(self.path / name, sealed_json(self.path, name, value))

    def _note(self, name: str) -> None:
        self.damaged.append(f"kept work was damaged and is made again ({name})")

    @property
    def evidence(self) -> EvidenceFolder:
        """The evidence that was kept so far."""
        return EvidenceFolder(self.path / "evidence")

    def save_calibration(self, calibration: Calibration) -> None:
        """Say that the evidence of all sites is there, and what it was gathered from."""
        data = {key: getattr(calibration, key) for key in ("sequences", "tokens", "text", "warnings")}
        self.write_json(_CALIBRATION, data)

    def load_calibration(self) -> Calibration | None:
        """The calibration that was kept, or None; its evidence is read when it is asked for."""
        data = self.read_json(_CALIBRATION, again=True)
        return None if data is None else Calibration(self.evidence, **data)

    def save_packed(self, site: str, method: str, setting: dict[str, Any], packed: Packed) -> Packed:
        """Keep an encoded form; returns it as one whose content lies here and takes no memory."""
        head = {name: getattr(packed, name) for name in ("parts", "meta", "codecs", "resident", "crc")}
        text = json.dumps(head).encode()
        name = self._point(site, method, setting)
        # The content has a checksum of its own in the head.
        head_bytes = digest(place_in(self.path, name), text) + len(text).to_bytes(4, "little") + text
        path = self.path / name
        self.witness.check()
        # Not flushed to the disk one by one: a form lost in a power cut is encoded again.
        write_file(path, head_bytes, packed.blob, flush=False)
        return replace(packed, content=Stored(path, len(head_bytes), packed.bytes, packed.crc))

    def load_packed(self, site: str, method: str, setting: dict[str, Any]) -> Packed | None:
        """An encoded form that was kept, or None, also if it did not reach the disk in whole."""
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
            self._note(name)
            return None
        stored = Stored(path, split, len(content) - split, head["crc"])
        return Packed(stored, head["parts"], head["meta"], head["codecs"], head["resident"])

    def _point(self, site: str, method: str, setting: dict[str, Any]) -> str:
        key = json.dumps([site, method, setting], sort_keys=True).encode()
        return f"points/{hashlib.sha256(key).hexdigest()[:32]}.bin"


def files_of(path: Path) -> dict[str, str] | None:
    """Checksums of the files that kept work was made from, or None where that cannot be told."""
    try:
        return dict(unsealed_json(path, _JOB, (path / _JOB).read_bytes())["files"])
    except (OSError, ValueError, KeyError):
        return None


def forget(path: Path) -> None:
    """Remove a folder of unfinished work, and no other."""
    if holds_work(path):
        shutil.rmtree(path, ignore_errors=True)


def holds_work(path: Path) -> bool:
    """Whether there is a folder of unfinished work, or a profile."""
    return (path / _JOB).exists()


def holds_profile(path: Path, job: dict[str, Any]) -> bool:
    """Whether there is a finished profile of a job."""
    try:
        return (path / _PROFILE).exists() and unsealed_json(path, _JOB, (path / _JOB).read_bytes()) == json.loads(
            json.dumps(job)
        )
    except (OSError, ValueError):
        return False  # a damaged folder is refused by whoever opens it


def _empty(path: Path) -> None:
    """Remove what is in a folder, but for the lock of this run."""
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
