"""Findings on disk, and the page that is made from them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import octavo
from octavo.recipes.base import Finding, Recipe, Trial, recipes
from octavo.report.gather import environment
from octavo.workspace import write_file

_PACKAGES = ("octavo", "torch", "numpy", "transformers", "accelerate", "scikit-learn")


def folder() -> Path:
    """Where full results are read and written: ``docs/results`` of the checkout, or of the current folder."""
    checkout = Path(octavo.__file__).parents[2]
    return (checkout if (checkout / "pyproject.toml").exists() else Path()) / "docs" / "results"


def reproduce(recipe: Recipe, trial: Trial) -> dict[str, Any]:
    """Run a recipe; returns what is saved as its result."""
    started = time.perf_counter()
    finding = recipe.run(trial)
    options = " --quick" * trial.quick + f" --seed {trial.first_seed}" * bool(trial.first_seed)
    return {
        "name": recipe.name,
        "system": recipe.system,
        "source": recipe.source,
        "claim": recipe.claim,
        "metric": recipe.metric,
        "data": recipe.data,
        "quick": trial.quick,
        "holds": finding.holds,
        "reason": finding.reason,
        "checks": [
            {"statement": check.statement, "holds": check.holds, "figures": check.figures} for check in finding.checks
        ],
        "arms": _arms(finding),
        "seeds": list(trial.seeds),
        "command": f"octavo reproduce {recipe.name}{options}",
        "seconds": round(time.perf_counter() - started, 1),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": _versions(),
        "machine": environment(),
    }


def save(result: dict[str, Any], where: Path | None = None) -> Path:
    """Write a result as ``NAME.json``."""
    where = where or folder()
    where.mkdir(parents=True, exist_ok=True)
    file = where / f"{result['name']}.json"
    write_file(file, (json.dumps(result, indent=1) + "\n").encode())
    return file


def last(name: str, where: Path | None = None) -> dict[str, Any] | None:
    """The last full result of a recipe, or None."""
    file = (where or folder()) / f"{name}.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


def listing(where: Path | None = None) -> list[dict[str, Any]]:
    """Every recipe with its last full result."""
    return [
        {
            "name": recipe.name,
            "system": recipe.system,
            "source": recipe.source,
            "claim": recipe.claim,
            "result": last(recipe.name, where),
        }
        for recipe in recipes().values()
    ]


def figure(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}"


def page(results: Iterable[dict[str, Any]]) -> str:
    """``docs/recipes.md``, from the results alone."""
    results = sorted(results, key=lambda result: result["system"].lower())
    verdict = {True: "holds", False: "does not hold at this scale"}
    lines = [
        "# Recipes",
        "",
        "Published systems rebuilt from Octavo's parts, each with an honest small experiment of its claim. Made from",
        "`docs/results/*.json` by `octavo reproduce --page`; `octavo reproduce NAME` makes a result anew. Bytes are",
        "those of an artifact that was written and read back before the metric was taken.",
        "",
        "| recipe | system | claim | here |",
        "| --- | --- | --- | --- |",
        *(f"| [{r['name']}](#{r['name']}) | {r['system']} | {r['claim']} | {verdict[r['holds']]} |" for r in results),
    ]
    for result in results:
        also = list(dict.fromkeys(key for arm in result["arms"] for key in arm["also"]))
        lines += ["", f"## {result['name']}", "", f"{result['system']}: {result['source']}.", ""]
        lines += [f"Claim: {result['claim']} **{verdict[result['holds']].capitalize()}.** {result['reason']}", ""]
        lines += [f"- {'holds' if c['holds'] else 'fails'}: {c['statement']} {c['figures']}" for c in result["checks"]]
        lines += ["", f"Data: {result['data']}.", ""]
        head = ["arm", "bytes", result["metric"], "spread", *also]
        lines += [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
        for arm in result["arms"]:
            spread = "-" if arm["spread"] is None else figure(arm["spread"])
            cells = [arm["name"], f"{arm['bytes']:,}" if arm["bytes"] else "-", figure(arm["mean"]), spread]
            cells += [figure(arm["also"][key]) if key in arm["also"] else "-" for key in also]
            lines.append(f"| {' | '.join(cells)} |")
        versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
        machine = f"{result['machine']['platform']}, {result['machine']['threads']} threads"
        ran = f"`{result['command']}`, {result['seconds'] / 60:.1f} minutes, {result['date']}"
        lines += ["", f"{ran}; seeds {', '.join(map(str, result['seeds']))}; {versions}; {machine}."]
    return "\n".join(lines) + "\n"


def _arms(finding: Finding) -> list[dict[str, Any]]:
    return [
        {
            "name": arm.name,
            "bytes": arm.bytes,
            "values": list(arm.values),
            "mean": arm.mean,
            "spread": arm.spread,
            "also": arm.also,
        }
        for arm in finding.arms
    ]


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found.setdefault("octavo", octavo.__version__)
    return found


def write_page(where: Path | None = None) -> Path:
    """Make the page of all full results anew."""
    where = where or folder()
    found = [result for name in recipes() if (result := last(name, where)) is not None]
    file = where.parent / "recipes.md"
    file.write_text(page(found), encoding="utf-8")
    return file
