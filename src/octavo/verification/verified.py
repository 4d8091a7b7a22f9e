"""The result of verifying an artifact, as a record."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.verification.recorded import Quality


@dataclass(frozen=True)
class PackedRun:
    """An artifact made for memory as it runs from packed codes.

    Parameters
    ----------
    stated, held
        Bytes of memory that its manifest states, and that its weights were seen to take.
    error
        Relative error of the first output on fixed tokens against decoded weights in float32; None for models
        without token ids.
    allowed
        The largest error accepted, a multiple of that of the same weights in bfloat16; None likewise.
    """

    stated: int | None
    held: int
    error: float | None = None
    allowed: float | None = None


@dataclass(frozen=True)
class Verified:
    """What was found to be as it should be.

    Parameters
    ----------
    path
        The artifact, as it was given.
    bytes
        Artifact bytes.
    ratio
        Original bytes by artifact bytes.
    tensors
        Number of tensors, tied names counted.
    weights_sha256
        The digest of the decoded weights; in a folder of another runtime, of its files' recorded checksums.
    weights_match, outputs_match
        True if they are those recorded; None if nothing was recorded. In a folder of another runtime, the first is True
        if all files are those recorded, and outputs are not compared.
    outputs_difference
        How far outputs on a fixed input are from those recorded, relative to the largest; None if none were recorded.
    loader
        How the model was loaded, as a user writes it; None if it has none that is known here.
    quality
        As it was measured when the artifact was written; None without a report.
    packed
        How it runs from packed codes, if it was made for memory.
    """

    path: str
    bytes: int
    ratio: float
    tensors: int
    weights_sha256: str
    weights_match: bool | None = None
    outputs_match: bool | None = None
    outputs_difference: float | None = None
    loader: str | None = None
    quality: Quality | None = None
    packed: PackedRun | None = None
