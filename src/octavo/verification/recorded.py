"""What was recorded of an artifact when it was written: its quality, and by what it is known again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from octavo.errors import ArtifactError
from octavo.system.records import FieldError, record_of
from octavo.system.strict_json import read_object
from octavo.verification.probes import Outputs

REPORT = "report.html"
#: Largest size of a report: 64 MB.
LARGEST_REPORT = 64 << 20


@dataclass(frozen=True)
class Quality:
    """How far the loaded artifact was from its source on data held back.

    Parameters
    ----------
    metric
        What ``value``, ``uniform`` and ``p95`` are, such as ``1 - cosine``.
    lower_is_better
        Whether a small value is a good one.
    loader
        How the artifact was loaded, as a user writes it; empty if it was not, or is not kept.
    became
        Files of another runtime that the weights became after they were measured; empty if there are none.
    why
        Why nothing was measured; empty if it was.
    data
        On what it was measured.
    value
        Mean over all examples; None if it was not measured.
    uniform
        That of the best single setting everywhere.
    p95
        The 95th percentile over all examples.
    """

    metric: str
    lower_is_better: bool = True
    loader: str = ""
    became: str = ""
    why: str = ""
    data: str = ""
    value: float | None = None
    uniform: float | None = None
    p95: float | None = None


@dataclass(frozen=True)
class Digests:
    """By what an artifact is known again.

    Parameters
    ----------
    weights
        SHA-256 over the decoded content of every tensor, in hexadecimal.
    outputs
        What the loaded model gave on a fixed input; None for what takes no such input.
    """

    weights: str | None = None
    outputs: Outputs | None = None


@dataclass(frozen=True)
class PackedSpeed:
    """Median seconds of ``what``, from packed codes and in bfloat16 dense."""

    what: str
    unit: str
    packed: float
    dense: float


@dataclass(frozen=True)
class PackedFigures:
    """An artifact made for memory, as it runs from packed codes.

    Parameters
    ----------
    stated
        Bytes of memory that its manifest states.
    held
        Bytes of memory that its weights were measured to take.
    kernels
        Number of sites by kernel.
    quality
        Mean divergence from the source on held-out data.
    note
        What is missing or slow, and why.
    """

    stated: int
    held: int
    kernels: Mapping[str, int] = field(default_factory=dict)
    quality: float | None = None
    speed: PackedSpeed | None = None
    note: str = ""


@dataclass(frozen=True)
class Recorded:
    """The part of a report that a verification compares with; every part is None that is not in the report."""

    quality: Quality | None = None
    digests: Digests | None = None


def recorded_beside(artifact: Path) -> Recorded:
    """What the report beside an artifact records; nothing if there is no report.

    Raises
    ------
    ArtifactError
        If there is a file in its place that is no report.
    """
    file = (artifact / REPORT).with_suffix(".json")
    if not file.exists():
        return Recorded()
    try:
        return record_of(Recorded, read_object(file, most=LARGEST_REPORT))
    except FieldError as error:
        raise ArtifactError(f"{file}: not a report: {error}; remove it, or copy the artifact again") from error
