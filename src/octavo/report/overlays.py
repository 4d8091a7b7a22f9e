"""What can be laid over the explorer's curve: another artifact's report, or points of other tools."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.errors import ArtifactError, RequestError
from octavo.report.schema import Report
from octavo.report.text import known, plain, ratio
from octavo.system.paths import checked
from octavo.system.records import FieldError, record_of
from octavo.system.strict_json import read_object, read_plain
from octavo.verification.recorded import LARGEST_REPORT

#: Limits on what one file may bring to the page.
_SERIES, _POINTS, _LARGEST_LIST = 40, 400, 1 << 20


@dataclass(frozen=True)
class Peer:
    """A point of another tool, as a file states it."""

    name: str
    bytes: int
    loss: float


@dataclass(frozen=True)
class Overlay:
    """A line and single points, of bytes and loss each.

    Parameters
    ----------
    line
        Expected losses.
    marks
        Measured ones.
    metric, target, source
        What a report says of them: the metric of quality, what the bytes count, and the fingerprint of the source.
        Empty for the points of others.
    """

    name: str
    line: tuple[tuple[int, float], ...] = ()
    marks: tuple[tuple[int, float], ...] = ()
    metric: str = ""
    target: str = ""
    source: str = ""


def read_report(path: Path) -> Report:
    """Read a ``report.json``.

    Raises
    ------
    RequestError
        If it cannot be read.
    ArtifactError
        If it is not a report, naming the first value that is wrong.
    """
    return Report.from_json(read_object(checked(path), most=LARGEST_REPORT, error=RequestError), str(path))


def read_overlays(path: Path) -> list[Overlay]:
    """Read a ``report.json``, or a JSON list of points such as ``[{"name": "GPTQ", "bytes": 5, "loss": 0.1}]``.

    Raises
    ------
    RequestError
        If it is neither, naming the first value that is wrong.
    """
    content = read_plain(checked(path), most=LARGEST_REPORT, error=RequestError)
    try:
        if not content.lstrip().startswith(b"["):
            return [of_report(read_report(path))]
        if len(content) > _LARGEST_LIST:
            raise FieldError(f"{len(content):,} bytes are more than a list of points takes ({_LARGEST_LIST:,})")
        return _of_points(json.loads(content))
    except ArtifactError as error:
        raise RequestError(str(error)) from error
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"{path}: not a list of points: {error}; give objects with name, bytes and loss, or a report.json"
        ) from error


def of_report(report: Report) -> Overlay:
    """The curve of a report and its artifact's measured point."""
    chosen, stops = report.curve.chosen, report.explorer.stops
    line = [(point.bytes, point.expected) for point in stops or report.curve.points]
    marks = []
    if known(chosen.quality) and report.quality.lower_is_better and chosen.ratio > 0:
        # What the budget counts, which for memory are not the bytes of the files.
        marks.append((round(report.source.bytes / chosen.ratio), chosen.quality))
    return Overlay(
        f"{plain(report.title, 60)}, {ratio(chosen.ratio)}",
        tuple((size, loss) for size, loss in line if known(loss)),
        tuple(marks),
        plain(report.quality.metric, 60),
        report.budget.target,
        report.source.fingerprint,
    )


def _of_points(data: Any) -> list[Overlay]:
    if not data:
        raise FieldError("it is empty")
    if len(data) > _POINTS:
        raise FieldError(f"{len(data):,} points are more than a page can show ({_POINTS})")
    series: dict[str, list[tuple[int, float]]] = {}
    for number, item in enumerate(data):
        point = record_of(Peer, item, f"[{number}]")
        if point.bytes <= 0 or point.loss < 0:
            raise FieldError(f"[{number}] has {point.bytes} bytes and loss {point.loss:g}; write both as measured")
        series.setdefault(plain(point.name, 60), []).append((point.bytes, point.loss))
    if len(series) > _SERIES:
        raise FieldError(f"{len(series)} names are more than a page can tell apart ({_SERIES})")
    return [Overlay(name, marks=tuple(sorted(points))) for name, points in series.items()]
