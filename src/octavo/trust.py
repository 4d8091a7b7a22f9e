"""Artifacts before a loader of another library reads them: what could lead it elsewhere is refused."""

from __future__ import annotations

import warnings
from pathlib import Path

from octavo.artifact import MANIFEST, Artifact
from octavo.artifact.configuration import CONFIG, check_config
from octavo.errors import ArtifactError
from octavo.integrations.sentences import members, transformer_folder
from octavo.notes import OctavoWarning

_ADAPTER = "adapter_config.json"


def root_of(folder: Path) -> Path | None:
    """The artifact that a model's folder is, or is a module of; None if it is neither."""
    return next((place for place in (folder, folder.parent) if (place / MANIFEST).exists()), None)


def trusted(path: Path) -> Artifact:
    """An artifact whose configuration names no code and no other weights, with a warning if it was changed.

    Raises
    ------
    ArtifactError
        If it is damaged, or does.
    """
    artifact = Artifact(path)
    folder = transformer_folder(path)
    largest = max((size for shape in artifact.loadable_shapes().values() for size in shape), default=1)
    if (folder / CONFIG).exists():
        check_config(folder / CONFIG, largest)
    changed = artifact.changed()
    adapter = (folder / _ADAPTER).relative_to(path).as_posix()
    if (folder / _ADAPTER).exists() and (adapter not in artifact.configurations or f"{adapter} was changed" in changed):
        raise ArtifactError(
            f"{folder / _ADAPTER}: was not written with this artifact, and names a model that loaders would take "
            "in its place; remove it"
        )
    for member in members(path):
        if not (path / member.path).is_dir():
            raise ArtifactError(
                f"{path}: the folder {member.path!r} of modules.json is missing; copy the artifact again"
            )
    if changed:
        warnings.warn(
            f"{path}: {', '.join(changed)} since the artifact was written; the model may be another one",
            OctavoWarning,
            stacklevel=3,
        )
    return artifact
