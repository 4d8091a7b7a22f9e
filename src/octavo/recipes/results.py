"""Results on disk, and the page made from them."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from octavo.errors import RequestError
from octavo.recipes.base import Check, Recipe, Trial, recipes
from octavo.report.gather import environment
from octavo.report.schema import Environment
from octavo.system.atomic import write_file
from octavo.system.records import plain_json, record_of
from octavo.system.version import __version__

_PACKAGES = ("octavo", "torch", "numpy", "transformers", "accelerate", "scikit-learn")


@dataclass(frozen=True)
class ArmRow:
    """One arm: its stored bytes, its figure by seed with mean and standard deviation, and other figures by name."""

    name: str
    bytes: int
    values: tuple[float, ...]
    mean: float
    spread: float | None
    also: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class RecipeResult:
    """What a run of a recipe found, as ``docs/results/NAME.json`` holds it.

    Parameters
    ----------
    name, system, source, claim, metric, data
        Those of the recipe.
    quick
        Whether it was a miniature.
    holds, reason
        The verdict.
    recipe
        The fingerprint of the code that ran.
    seconds
        The time that the run took.
    date
        The day in UTC, ``2026-11-22``.
    versions
        Version by package.
    machine
        As :func:`octavo.report.gather.environment`.
    """

    name: str
    system: str
    source: str
    claim: str
    metric: str
    data: str
    quick: bool = False
    holds: bool
    reason: str
    checks: tuple[Check, ...]
    arms: tuple[ArmRow, ...]
    seeds: tuple[int, ...]
    recipe: str = ""
    command: str
    seconds: float
    date: str
    versions: Mapping[str, str]
    machine: Environment


@dataclass(frozen=True)
class ListedRecipe:
    """A recipe with its last full result."""

    name: str
    system: str
    source: str
    claim: str
    result: RecipeResult | None


def folder() -> Path:
    """The folder of full results: ``docs/results`` of the checkout, or of the current folder."""
    checkout = Path(__file__).parents[3]
    return (checkout if (checkout / "pyproject.toml").exists() else Path()) / "docs" / "results"


def fingerprint(recipe: Recipe) -> str:
    """A digest of the recipe's code; imports, docstrings, lines of comment and white space do not count."""
    source = inspect.getsource(sys.modules[recipe.run.__module__])
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            left_out.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = [line for number, line in enumerate(source.splitlines(), 1) if number not in left_out]
    code = "".join("".join(line.split()) for line in lines if not line.lstrip().startswith("#"))
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def outdated(result: RecipeResult) -> bool:
    """Whether the recipe changed since it made this result."""
    recipe = recipes().get(result.name)
    return recipe is not None and result.recipe != fingerprint(recipe)


def reproduce(recipe: Recipe, trial: Trial) -> RecipeResult:
    """Run a recipe; returns the content of its result file.

    Raises
    ------
    RequestError
        If an arm has a figure that is not finite.
    """
    started, made_by = time.perf_counter(), fingerprint(recipe)
    finding = recipe.run(trial)
    for arm in finding.arms:
        if not all(math.isfinite(value) for value in (*arm.values, *arm.also.values())):
            raise RequestError(f"{recipe.name}: arm {arm.name!r} has figures that are not finite: {arm}")
    options = " --quick" * trial.quick + f" --seed {trial.first_seed}" * bool(trial.first_seed)
    return RecipeResult(
        name=recipe.name,
        system=recipe.system,
        source=recipe.source,
        claim=recipe.claim,
        metric=recipe.metric,
        data=recipe.data,
        quick=trial.quick,
        holds=finding.holds,
        reason=finding.reason,
        checks=tuple(finding.checks),
        arms=tuple(
            ArmRow(arm.name, arm.bytes, tuple(arm.values), arm.mean, arm.spread, arm.also) for arm in finding.arms
        ),
        seeds=tuple(trial.seeds),
        recipe=made_by,
        command=f"octavo reproduce {recipe.name}{options}",
        seconds=round(time.perf_counter() - started, 1),
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        versions=_versions(),
        machine=environment(),
    )


def save(result: RecipeResult, where: Path | None = None) -> Path:
    """Write a result as ``NAME.json``."""
    where = writable(where)
    file = where / f"{result.name}.json"
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


def last(name: str, where: Path | None = None) -> RecipeResult | None:
    """The last full result of a recipe, or None.

    Raises
    ------
    RequestError
        If the file is not a result.
    """
    file = (where or folder()) / f"{name}.json"
    if not file.exists():
        return None
    try:
        return record_of(RecipeResult, json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise RequestError(f"{file}: not a result of a recipe: {error}; remove it, or run the recipe again") from error


def listing(where: Path | None = None) -> list[ListedRecipe]:
    """Every recipe with its last full result."""
    return [
        ListedRecipe(recipe.name, recipe.system, recipe.source, recipe.claim, last(recipe.name, where))
        for recipe in recipes().values()
    ]


def figure(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}"


def page(results: Iterable[RecipeResult]) -> str:
    """The text of ``docs/recipes.md``, from the results."""
    results = sorted(results, key=lambda result: result.system.lower())
    verdict = {True: "holds", False: "does not hold at this scale"}
    lines = [
        "# Recipes",
        "",
        "Published systems rebuilt from Octavo's parts, each with an honest small experiment of its claim. Made from",
        "`docs/results/*.json` by `octavo reproduce --page`; `octavo reproduce NAME` makes a result anew. Where an arm",
        "has bytes, they are those of an artifact that was written and read back. Spread is the standard deviation of",
        "seeds; differences are of pairs that share a seed, with their standard error, two of which decide.",
        "",
        "| recipe | system | claim | here |",
        "| --- | --- | --- | --- |",
        *(f"| [{r.name}](#{r.name}) | {r.system} | {r.claim} | {verdict[r.holds]} |" for r in results),
    ]
    for result in results:
        also = list(dict.fromkeys(key for arm in result.arms for key in arm.also))
        lines += ["", f"## {result.name}", "", f"{result.system}: {result.source}.", ""]
        lines += [f"Claim: {result.claim} **{verdict[result.holds].capitalize()}.** {result.reason}", ""]
        lines += [f"- {'holds' if c.holds else 'fails'}: {c.statement} {c.figures}" for c in result.checks]
        if outdated(result):
            lines += ["", "The recipe has changed since this run."]
        lines += ["", f"Data: {result.data}.", ""]
        head = ["arm", "bytes", result.metric, "spread", *also]
        lines += [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
        for arm in result.arms:
            spread = "-" if arm.spread is None else figure(arm.spread)
            cells = [arm.name, f"{arm.bytes:,}" if arm.bytes else "-", figure(arm.mean), spread]
            cells += [figure(arm.also[key]) if key in arm.also else "-" for key in also]
            lines.append(f"| {' | '.join(cells)} |")
        versions = ", ".join(f"{name} {number}" for name, number in result.versions.items())
        machine = f"{result.machine.platform}, {result.machine.threads} threads"
        ran = f"`{result.command}`, {result.seconds / 60:.1f} minutes, {result.date}"
        lines += ["", f"{ran}; seeds {', '.join(map(str, result.seeds))}; {versions}; {machine}."]
    return "\n".join(lines) + "\n"


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found.setdefault("octavo", __version__)
    return found


def write_page(where: Path | None = None) -> Path:
    """Write the page of all full results: ``docs/recipes.md``, or ``recipes.md`` in the given folder."""
    file = (where or folder().parent) / "recipes.md"
    writable(file.parent)
    found = [result for name in recipes() if (result := last(name, where)) is not None]
    write_file(file, page(found).encode())
    return file
