"""The folder of unfinished work: steps as sealed JSON, evidence, hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from octavo.calibration.evidence_folder import EvidenceFolder
from octavo.errors import RequestError
from octavo.sources.witness import Witness
from octavo.system.atomic import write_file
from octavo.system.sealed import sealed_json, unsealed_json

#: Prefix of temporary folders, which the next run removes.
SCRATCH = "octavo-states-"


class WorkFolder:
    """A folder of finished steps.

    Parameters
    ----------
    path
        The folder.
    witness
        The input files of the work: nothing is kept of others.
    """

    def __init__(self, path: Path, witness: Witness) -> None:
        self.path, self.witness = path, witness
        #: Notes on damaged files that are made again.
        self.damaged: list[str] = []

    def read_json(self, name: str, *, again: bool = False) -> dict[str, Any] | None:
        """The JSON stored under a name, or None.

        Parameters
        ----------
        again
            Whether damaged content can be made again: then None is returned and a note says so.

        Raises
        ------
        RequestError
            If it is damaged and cannot be made again.
        """
        try:
            return unsealed_json(self.path, name, (self.path / name).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            if again:
                self.note_damage(name)
                return None
            raise RequestError(f"{self.path / name}: damaged: {error}; remove {self.path} and start again") from error

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Write JSON atomically."""
        self.witness.check()
        write_file(self.path / name, sealed_json(self.path, name, value))

    def note_damage(self, name: str) -> None:
        """Note that a damaged file is made again."""
        self.damaged.append(f"kept work was damaged and is made again ({name})")

    @property
    def evidence(self) -> EvidenceFolder:
        """The evidence that was kept so far."""
        return EvidenceFolder(self.path / "evidence")
