"""Results of studies on disk."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from octavo.errors import RequestError
from octavo.recipes.frame.fingerprints import code_of
from octavo.recipes.frame.judging import Gate, Judged, tally
from octavo.recipes.frame.lab import Lab
from octavo.recipes.frame.records import Arm, BaseRecord, Choice
from octavo.recipes.frame.study import Study, studies
from octavo.report.gather import environment
from octavo.report.schema import Environment
from octavo.system.atomic import write_file
from octavo.system.records import plain_json, record_of
from octavo.system.version import __version__

_PACKAGES = ("octavo", "torch", "numpy", "transformers", "accelerate", "scikit-learn")


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """What a run found, as ``docs/results/NAME.json`` holds it.

    Parameters
    ----------
    name, system, source, metric, higher, data
        Those of the study.
    quick
        Whether it was a miniature.
    claims
        Claims and extras with their verdicts.
    reason
        Why, in a few sentences.
    made_by
        Digests of the code that ran, by module: study, frame, methods, cuts, regimens and bases.
    seconds
        The time that the run took, without the bases that it found in the cache.
    trained_on
        The device of all training, ``CPU`` or the name of a GPU, and ``in bfloat16`` if it multiplied so.
    date
        The day in UTC, ``2026-11-22``.
    """

    name: str
    system: str
    source: str
    metric: str
    higher: bool
    data: str
    quick: bool = False
    claims: tuple[Judged, ...]
    gates: tuple[Gate, ...]
    arms: tuple[Arm, ...]
    choices: tuple[Choice, ...]
    bases: tuple[BaseRecord, ...]
    reason: str
    seeds: tuple[int, ...]
    made_by: Mapping[str, str]
    command: str
    seconds: float
    trained_on: str
    date: str
    versions: Mapping[str, str]
    machine: Environment

    @property
    def tally(self) -> str:
        """``published 3/3 · extra 1/2 (1 undecided)``."""
        return tally(self.claims)


@dataclass(frozen=True)
class ListedStudy:
    """A study with its last full result."""

    name: str
    system: str
    source: str
    claims: tuple[str, ...]
    result: StudyResult | None


def folder() -> Path:
    """The folder of full results: ``docs/results`` of the checkout, or of the current folder."""
    checkout = Path(__file__).parents[4]
    return (checkout if (checkout / "pyproject.toml").exists() else Path()) / "docs" / "results"


def changed(result: StudyResult) -> list[str]:
    """Modules whose code is no longer that which made the result."""
    study = studies().get(result.name)
    if study is None:
        return []
    now = code_of(study.run, reproduce)
    return sorted(name for name in {*now, *result.made_by} if now.get(name) != result.made_by.get(name))


def reproduce(study: Study, lab: Lab) -> StudyResult:
    """Run a study; returns the content of its result file.

    Raises
    ------
    RequestError
        If an arm has a figure that is not finite.
    OctavoError
        If the run was not fair or not whole (:meth:`Lab.check`).
    """
    made_by = code_of(study.run, reproduce)
    study.run(lab)
    lab.check()
    for arm in lab.arms.values():
        if not all(math.isfinite(value) for values in (arm.values, *arm.also.values()) for value in values):
            raise RequestError(f"{study.name}: arm {arm.name!r} has figures that are not finite: {arm}")
    lab.forget()
    options = " --quick" * lab.quick + f" --seed {lab.first_seed}" * bool(lab.first_seed)
    order = [*study.claims, *study.extras]
    return StudyResult(
        name=study.name,
        system=study.system,
        source=study.source,
        metric=study.metric,
        higher=study.higher,
        data=study.data,
        quick=lab.quick,
        claims=tuple(lab.judged[key] for key in order),
        gates=tuple(lab.gates),
        arms=tuple(lab.arms.values()),
        choices=tuple(lab.choices.values()),
        bases=tuple(lab.bases.values()),
        reason=" ".join(lab.reason),
        seeds=lab.seeds,
        made_by=made_by,
        command=f"octavo reproduce {study.name}{options}",
        seconds=round(lab.seconds, 1),
        trained_on=lab.trained_on,
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        versions=_versions(),
        machine=environment(),
    )


def save(result: StudyResult, where: Path | None = None) -> Path:
    """Write a result as ``NAME.json``."""
    file = writable(where) / f"{result.name}.json"
    write_file(file, (json.dumps(plain_json(result), indent=1) + "\n").encode())
    return file


def writable(where: Path | None = None) -> Path:
    """The folder of results, created if missing; checked before a long run, whose result would be lost.

    Raises
    ------
    RequestError
        If nothing can be written there.
    """
    where = where or folder()
    try:
        where.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{where}: no folder for results can be made there: {error}; choose another") from error
    if not os.access(where, os.W_OK):
        raise RequestError(f"{where}: results cannot be written there; choose another folder with --results")
    return where


def last(name: str, where: Path | None = None) -> StudyResult | None:
    """The last full result of a study, or None.

    Raises
    ------
    RequestError
        If the file is not a result.
    """
    file = (where or folder()) / f"{name}.json"
    if not file.exists():
        return None
    try:
        return record_of(StudyResult, json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise RequestError(f"{file}: not a result of a study: {error}; remove it, or run the study again") from error


def listing(where: Path | None = None) -> list[ListedStudy]:
    """Every study with its last full result."""
    return [
        ListedStudy(study.name, study.system, study.source, tuple(study.claims.values()), last(study.name, where))
        for study in studies().values()
    ]


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found.setdefault("octavo", __version__)
    return found
