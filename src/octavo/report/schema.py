"""What a report holds, as records; JSON is made of them at the edge, and read back with every value checked.

Sizes are in bytes, times in seconds unless a field says otherwise, and a number that was not measured is None.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from octavo.encoding.cut_trials import CutTrials
from octavo.encoding.section import Section
from octavo.errors import ArtifactError
from octavo.report.stops import Explorer
from octavo.system.records import FieldError, plain_json, record_of
from octavo.verification.recorded import Digests, PackedFigures, Quality

#: Version of ``report.json``: it rises when a key changes its meaning or goes.
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Environment:
    """Versions and machine, without anything that names a person or a path."""

    python: str = ""
    torch: str = ""
    cpu_count: int | None = None
    threads: int | None = None
    platform: str = ""


@dataclass(frozen=True)
class Original:
    """The source.

    Parameters
    ----------
    path
        Its folder's name, and no more of the path.
    bytes
        Its distinct tensors at the precision that they are stored in.
    parameters
        Weights, tied ones once.
    dtypes
        Weights by dtype.
    stored
        Bytes by the format of a quantized file; empty for any other.
    dense_bytes
        What it takes decoded.
    base
        The base that it is stored as the difference to, if any: ``bytes`` are then those of the difference in 16 bits.
    """

    path: str
    fingerprint: str
    bytes: int
    parameters: int
    dtypes: Mapping[str, int] = field(default_factory=dict)
    stored: Mapping[str, int] | None = None
    dense_bytes: int | None = None
    base: str | None = None


@dataclass(frozen=True)
class Allowed:
    """The budget.

    Parameters
    ----------
    asked
        The request in the user's words.
    bytes
        Bytes that this allows; of a budget that counts something else, those of the artifact.
    target
        The target that says what is counted.
    unit
        What is counted, in words: ``bytes in memory``.
    """

    asked: str
    bytes: int
    target: str = "disk"
    unit: str = "bytes"


@dataclass(frozen=True)
class WrittenArtifact:
    """The artifact as it lies on the disk.

    Parameters
    ----------
    ratio
        Original bytes by artifact bytes.
    used
        Share of the budget, 0 to 1.
    files
        Bytes by file, of the files that count.
    bits_per_weight
        Bits on the disk by weights of the source.
    note
        Why less than the budget is used; empty if it is used.
    """

    bytes: int
    ratio: float
    used: float
    files: Mapping[str, int]
    bits_per_weight: float
    note: str = ""


@dataclass(frozen=True)
class Latency:
    """Median time of a forward pass of one batch, and of loading, before and after, in ``unit``."""

    unit: str = "ms"
    original: float | None = None
    artifact: float | None = None
    note: str = ""
    load_original: float | None = None
    load_artifact: float | None = None


@dataclass(frozen=True)
class Calibrated:
    """What the choice of methods rests on, and warnings about it."""

    text: str
    sequences: int
    tokens: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class BestUniform:
    """The best single setting everywhere.

    Parameters
    ----------
    sites, of
        The number of sites that really have it, out of all.
    moved
        Whether it was moved a little at some sites to use the budget.
    bytes
        Artifact bytes; None if it was not built and bytes on the disk are not what the budget counts.
    held
        Bytes of memory, if the budget counts these.
    """

    method: str
    setting: Mapping[str, Any]
    sites: int | None = None
    of: int | None = None
    moved: bool = False
    bytes: int | None = None
    held: int | None = None
    quality: float | None = None


@dataclass(frozen=True)
class CurvePoint:
    """Expected and measured loss of the best choice site by site at a ratio."""

    ratio: float
    bytes: int
    expected: float | None
    measured: float | None = None


@dataclass(frozen=True)
class UniformPoint:
    """Expected and measured loss of one method with one setting everywhere."""

    method: str
    setting: str
    ratio: float
    bytes: int
    expected: float | None
    measured: float | None = None


@dataclass(frozen=True)
class ChosenPoint:
    """Where the artifact lies on the curve, with its measured quality."""

    ratio: float
    bytes: int
    quality: float | None


@dataclass(frozen=True)
class Tradeoff:
    """Loss over size: the best choice site by site, single settings, and this artifact."""

    points: tuple[CurvePoint, ...]
    uniform: tuple[UniformPoint, ...]
    chosen: ChosenPoint


@dataclass(frozen=True)
class SiteRow:
    """A site, and what was chosen for it; ``tied`` are the other names of its tensor."""

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    method: str
    family: str
    setting: Mapping[str, Any]
    bytes: int
    original_bytes: int
    bits_per_weight: float
    expected_loss: float | None
    form: str
    tied: tuple[str, ...] = ()


@dataclass(frozen=True)
class KeptRow:
    """A tensor that was left alone, and why."""

    name: str
    shape: tuple[int, ...]
    bytes: int
    original_bytes: int
    reason: str


@dataclass(frozen=True)
class FamilyTotal:
    """Sites that a family of methods won, with their bytes and expected loss together."""

    sites: int
    bytes: int
    expected_loss: float | None


@dataclass(frozen=True)
class UnusedFamily:
    """A family that was tried and won no site.

    Parameters
    ----------
    sites
        Sites that it was tried at.
    larger
        Those of them at which it had nothing as small as what was chosen.
    exact
        Those at which it had, but what was chosen loses nothing.
    times
        Least and median over all others of its expected loss over the chosen one's; None if there are no others.
    nearest
        The site of the least; None likewise.
    """

    sites: int
    larger: int
    exact: int
    times: tuple[float, float] | None = None
    nearest: str | None = None


@dataclass(frozen=True)
class BitsHistogram:
    """Number of ``weights`` by bits a weight; ``bins`` are the edges."""

    bins: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that is known of a finished compression, measured on what was read back from the disk.

    ``report["artifact"]["bytes"]`` reads the same values as in ``report.json``.

    Parameters
    ----------
    created
        ISO 8601, in UTC.
    winner
        ``mixed`` or ``uniform``.
    coding
        Bytes by codec.
    timings
        Seconds by step, and their ``total``.
    peak_memory
        Largest resident bytes of the process.
    sections
        What the target has to say.
    explorer
        Plans at other ratios, for the page's slider.
    """

    schema_version: int = SCHEMA_VERSION
    title: str
    created: str
    octavo_version: str
    command: str
    environment: Environment
    seed: int
    preset: str
    source: Original
    budget: Allowed
    artifact: WrittenArtifact
    quality: Quality
    latency: Latency | None = None
    calibration: Calibrated
    winner: str
    uniform: BestUniform | None = None
    curve: Tradeoff
    sites: tuple[SiteRow, ...] = ()
    kept: tuple[KeptRow, ...] = ()
    families: Mapping[str, FamilyTotal] = field(default_factory=dict)
    unused: Mapping[str, UnusedFamily] = field(default_factory=dict)
    code_lengths: BitsHistogram = field(default_factory=BitsHistogram)
    coding: Mapping[str, int] = field(default_factory=dict)
    digests: Digests = field(default_factory=Digests)
    timings: Mapping[str, float | None] = field(default_factory=dict)
    peak_memory: float | None = None
    sections: tuple[Section, ...] = ()
    explorer: Explorer = field(default_factory=Explorer)

    def __post_init__(self) -> None:
        if not 1 <= self.schema_version <= SCHEMA_VERSION:
            raise ValueError(f"schema_version is {self.schema_version}, this version reads 1 to {SCHEMA_VERSION}")
        names = [section.name for section in self.sections]
        taken = {own.name for own in fields(self)} & {*names}
        if taken or len(set(names)) < len(names):
            raise ValueError(f"sections {', '.join(names)}: each needs a name that nothing else in the report has")

    def __getitem__(self, key: str) -> Any:
        return self.to_json()[key]

    @property
    def running(self) -> PackedFigures | None:
        """Figures of an artifact made for memory; None for others."""
        own = self.section("running")
        return None if own is None else record_of(PackedFigures, own.figures)

    @property
    def cut(self) -> CutTrials | None:
        """What was tried of a cut; None if no cut was asked for."""
        own = self.section("cut")
        return None if own is None else record_of(CutTrials, plain_json(own.figures))

    def section(self, name: str) -> Section | None:
        """The section of that name; None if there is none."""
        return next((own for own in self.sections if own.name == name), None)

    def to_json(self) -> dict[str, Any]:
        """The report as ``report.json`` has it; numbers that are not finite are null there."""
        data = {**plain_json(self), "running": None}
        for section in data["sections"]:
            data[section["name"]] = section.pop("figures")
        return data

    @classmethod
    def from_json(cls, data: Any, where: str = "report.json") -> Report:
        """Inverse of :meth:`to_json`, also for a file that anybody may have written.

        Raises
        ------
        ArtifactError
            If it is not a report, naming the first value that is wrong.
        """
        try:
            report = record_of(cls, data)
            report = replace(report, sections=tuple(_with_figures(section, data) for section in report.sections))
            for name, own in (("running", report.running), ("cut", report.cut)):
                if own is None and data.get(name) is not None:
                    raise FieldError(f"{name} holds figures, and no section has that name")
            return report
        except FieldError as error:
            raise ArtifactError(f"{where}: not a report: {error}") from error


def _with_figures(section: Section, data: Mapping[str, Any]) -> Section:
    figures = data.get(section.name, {})
    if not isinstance(figures, dict):
        raise FieldError(f"{section.name} holds no figures; an object is needed")
    return replace(section, figures=figures)
