"""The pages made from results: an index, and one page with a picture for every study."""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from octavo.errors import MissingExtraError
from octavo.recipes.frame.records import Arm, BaseRecord
from octavo.recipes.frame.results import StudyResult, changed, folder, last, writable
from octavo.recipes.frame.study import studies
from octavo.system.atomic import write_file

_INDEX = """# Recipes

Published systems rebuilt from Octavo's parts, each with a small fair experiment of its claims. The pages are made from
`docs/results/*.json` by `octavo reproduce --page`. `octavo reproduce NAME` makes a result.

A *published* statement is a claim of the system's paper; an *extra* is a question of our own. A statement *holds* if
the whole 95% interval of the difference lies above its margin, and is *refuted* if no part does. Otherwise it is
*undecided*. It is *not testable* if the experiment failed one of its health gates. Intervals are of pairs that share a
seed, by the t quantile. Where an arm has bytes, they are those of a file that was written and read back.

| study | system | verdicts |
| --- | --- | --- |
"""


def figure(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}"


def index(results: Iterable[StudyResult]) -> str:
    """The text of ``docs/recipes.md``."""
    rows = sorted(results, key=lambda result: result.system.lower())
    return _INDEX + "".join(f"| [{r.name}](recipes/{r.name}.md) | {r.system} | {r.tally} |\n" for r in rows)


def page(result: StudyResult) -> str:
    """The text of one study's page."""
    lines = [f"# {result.system}", "", f"{result.source}. `octavo reproduce {result.name}`: {result.tally}.", ""]
    for published, title in ((True, "Published claims"), (False, "Extras: questions of our own")):
        own = [claim for claim in result.claims if claim.published is published]
        if not own:
            continue
        lines += [f"## {title}", ""]
        for claim in own:
            lines += [f"- **{claim.verdict.value.capitalize()}**: {claim.text}"]
            lines += [f"  - {comparison}" for comparison in claim.gaps]
            lines += [f"  - gate not passed: {text}" for text in claim.failed]
        lines.append("")
    if result.reason:
        lines += [result.reason, ""]
    lines += [f"![{result.metric} of every arm]({result.name}.svg)", "", "## Arms", "", *_table(result), ""]
    if result.gates:
        lines += ["## Health gates", ""]
        for gate in result.gates:
            told = "; ".join(map(str, gate.gaps))
            lines.append(f"- {'passed' if gate.passed else 'not passed'}: {gate.text} ({told})")
        lines.append("")
    if result.choices:
        lines += ["## Chosen on development data", ""]
        for choice in result.choices:
            tried = ", ".join(
                f"{value}: {'diverged' if score is None else figure(score)}" for value, score in choice.scores.items()
            )
            edge = " It lies at the edge of what was tried." if choice.edge and len(choice.scores) > 1 else ""
            lines.append(f"- {choice.name}: {choice.value:g} (tried {tried}).{edge}")
        lines.append("")
    lines += [f"Data: {result.data}.", ""]
    if result.bases:
        lines += [f"Bases, trained once and cached: {_bases(result.bases)}.", ""]
    if old := changed(result):
        lines += [f"Changed since this run: {', '.join(f'`{name}`' for name in old)}.", ""]
    versions = ", ".join(f"{name} {number}" for name, number in result.versions.items())
    machine = f"{result.machine.platform}, {result.machine.threads} threads, trained on {result.trained_on}"
    ran = f"`{result.command}`, {result.seconds / 60:.1f} minutes, {result.date}"
    lines.append(f"{ran}; {len(result.seeds)} seeds from {result.seeds[0]}; {versions}; {machine}.")
    return "\n".join(lines) + "\n"


def _bases(bases: Sequence[BaseRecord]) -> str:
    """Bases that differ in their seed alone are told together; the key of the cache is left out."""
    groups: dict[str, list[BaseRecord]] = {}
    for base in bases:
        groups.setdefault(re.sub(r"(-s\d+)? \(\w+\)$", "", base.name), []).append(base)
    return "; ".join(
        f"{name} in {statistics.fmean(base.seconds for base in group):.0f} s on {group[0].device}"
        + (f" ({len(group)} seeds)" if len(group) > 1 else "")
        for name, group in groups.items()
    )


def _table(result: StudyResult) -> list[str]:
    also = list(dict.fromkeys(key for arm in result.arms for key in arm.also))
    trained = ["steps"] if any(arm.steps for arm in result.arms) else []
    head = ["arm", "bytes", result.metric, "spread", *also, *trained]
    rows = [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    for arm in result.arms:
        spread = "-" if arm.spread is None else figure(arm.spread)
        cells = [arm.name, f"{arm.bytes:,}" if arm.bytes else "-", figure(arm.mean), spread]
        cells += [figure(statistics.fmean(arm.also[key])) if arm.also.get(key) else "-" for key in also]
        cells += [f"{arm.steps:,}" if arm.steps else "-" for _ in trained]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def picture(result: StudyResult) -> str:
    """A row for every arm: its figures, their mean and spread, and its bytes. SVG."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("pictures of studies need matplotlib: pip install 'octavo[report]'") from error
    arms: Sequence[Arm] = result.arms[::-1]
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "octavo", "font.size": 8, "axes.grid": True}):
        drawn = Figure(figsize=(8, 0.8 + 0.24 * len(arms)), layout="constrained")
        axes = drawn.subplots()
        for row, arm in enumerate(arms):
            axes.plot(arm.values, [row] * len(arm.values), "o", markersize=3, color="#999999")
            axes.errorbar(arm.mean, row, xerr=arm.spread, fmt="o", markersize=5, color="#1f5fa8", capsize=3)
        values = [value for arm in arms for value in arm.values]
        if min(values) > 0 and max(values) > 20 * min(values):
            axes.set_xscale("log")
            # What is nearly lossless would press all others together.
            axes.set_xlim(left=max(min(values) / 1.5, max(values) / 2_000))
        names = [f"{arm.name} ({arm.bytes:,} bytes)" if arm.bytes else arm.name for arm in arms]
        axes.set_yticks(range(len(arms)), names)
        drawn.supxlabel(
            f"{result.metric}\n{'more' if result.higher else 'less'} is better; bars: one deviation", size=8
        )
        axes.grid(axis="y", alpha=0.3)
        written = io.StringIO()
        drawn.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()


def write_pages(where: Path | None = None) -> Path:
    """Write index and pages of all full results into ``docs``, or into the given folder; returns the index."""
    home = where or folder().parent
    pages = writable(home / "recipes")
    found = [result for name in studies() if (result := last(name, where)) is not None]
    write_file(home / "recipes.md", index(found).encode())
    for result in found:
        write_file(pages / f"{result.name}.md", page(result).encode())
        write_file(pages / f"{result.name}.svg", picture(result).encode())
    return home / "recipes.md"
