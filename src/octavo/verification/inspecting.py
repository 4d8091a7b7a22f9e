"""What an artifact holds, told from its manifest alone; nothing is decoded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.artifact import Artifact


@dataclass(frozen=True)
class StoredSite:
    """A site in the files: its form's name, the shape and dtype that it is restored to, and its bytes."""

    form: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits in the files by elements."""
        return self.bytes * 8 / math.prod(self.shape)


@dataclass(frozen=True)
class Inspected:
    """What an artifact holds.

    Parameters
    ----------
    path
        The artifact, as it was given.
    source
        What the manifest says of the source: ``title``, ``bytes``, ``weights`` and more.
    bytes
        Artifact bytes.
    ratio
        Original bytes by artifact bytes.
    bits_per_weight
        Bits of the artifact by weights of the source.
    resident
        Bytes in memory while it runs packed; None if it was not made for memory.
    kept
        Number of tensors that are in no form.
    tied
        Alias to the name that its tensor is stored under.
    sites
        Sites by name.
    """

    path: str
    source: Mapping[str, Any]
    bytes: int
    ratio: float
    bits_per_weight: float
    resident: int | None
    kept: int
    tied: Mapping[str, str]
    sites: Mapping[str, StoredSite]


def inspected(path: Path) -> Inspected:
    """Read an artifact's manifest.

    Raises
    ------
    ArtifactError
        If it is damaged, or the files are not those that it lists.
    """
    opened = Artifact(path)
    source = opened.manifest["source"]
    return Inspected(
        path=str(path),
        source=source,
        bytes=opened.bytes,
        ratio=source["bytes"] / opened.bytes,
        bits_per_weight=opened.bytes * 8 / source["weights"],
        resident=opened.resident,
        kept=len(opened.kept) + len(opened.coded),
        tied=dict(opened.aliases),
        sites={name: _site(entry) for name, entry in opened.sites.items()},
    )


def _site(entry: Mapping[str, Any]) -> StoredSite:
    size = sum(part[1] for part in entry["parts"].values())
    return StoredSite(entry["form"]["form"], tuple(entry["shape"]), entry["dtype"], size)
