"""Deltas opened together on one base, tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from octavo.artifact import Artifact
from octavo.artifact.deltas import on_base
from octavo.errors import RequestError


def opened(paths: Sequence[str | Path], base: Any) -> list[Artifact]:
    """Deltas of one base, each checked against it.

    Parameters
    ----------
    base
        As for :func:`octavo.load`.

    Raises
    ------
    RequestError
        If there is none, one is no delta, or they have different bases.
    ArtifactError
        If one is damaged, or the base is another model.
    """
    if isinstance(paths, str | Path) or not paths:
        raise RequestError(f"deltas are {paths!r}; give a list of folders, at least one")
    artifacts = [Artifact(path) for path in paths]
    with on_base(base):
        for artifact in artifacts:
            if artifact.delta is None:
                raise RequestError(f"{artifact.path}: holds a whole model and is no delta; compress it with base=")
            own, first = artifact.base.source, artifacts[0].base.source
            if own is not first and own.fingerprint() != first.fingerprint():
                raise RequestError(
                    f"{artifact.path}: is a delta of {own.title!r}, and {artifacts[0].path} of another model, "
                    f"{first.title!r}; give deltas of one base"
                )
    return artifacts


def differing(artifact: Artifact) -> dict[str, str]:
    """The base's names of the tensors that a delta stores differences of, and its own names of them."""
    assert artifact.delta is not None
    whole = set(artifact.delta.whole)
    names = {artifact.base.stored(name): name for name in artifact.names() if name not in whole}
    return {own: name for own, name in names.items() if own is not None}
