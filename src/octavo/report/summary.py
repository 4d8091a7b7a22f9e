"""The main figures: one sentence, a console table and a model card."""

import re
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from octavo.encoding.cut_trials import CutTrials
from octavo.encoding.section import Cell, Section
from octavo.report.schema import Latency, Original, Report
from octavo.report.text import (
    NOT_MEASURED,
    count,
    figures,
    known,
    moment,
    percent,
    plain,
    ratio,
    script,
    setting,
    size,
    things,
    timed,
)
from octavo.system.notes import by_kind
from octavo.verification.recorded import Quality

NOTHING = "–"


class Row(NamedTuple):
    """One line of the before/after comparison."""

    label: str
    original: str
    artifact: str
    uniform: str


def headline(report: Report) -> str:
    """The result in one sentence, such as ``90.87 MB -> 11.29 MB, 8.05x smaller, 1 - cosine 0.0031``."""
    source, artifact, quality, memory = report.source, report.artifact, report.quality, report.running
    sizes = f"{size(source.bytes)} -> {size(artifact.bytes)}"
    smaller = f"{ratio(artifact.ratio)} smaller"
    if memory:
        sizes = f"{size(source.bytes)} -> {size(memory.stated)} in memory"
        smaller = f"{ratio(source.bytes / memory.stated)} smaller"
    smaller = smaller.replace("×", "x")  # plain ASCII, for logs
    if not known(quality.value):
        return f"{sizes}, {smaller}, quality {NOT_MEASURED}"
    return f"{sizes}, {smaller}, {plain(quality.metric, 60)} {figures(quality.value)}"


def measured(quality: Quality) -> str:
    """State the data and the model of the quality measurement, or why there is none."""
    loader, why = plain(quality.loader, 120), plain(quality.why, 300)
    loaded = f" The artifact was loaded with {loader}; nothing was missing." if loader else ""
    if not known(quality.value):
        return f"Quality was {NOT_MEASURED}{': ' + why if why else ''}.{loaded}"
    value = f"{plain(quality.metric, 60)} {figures(quality.value)}"
    became = f" The weights were measured before they became {plain(quality.became)}." if quality.became else ""
    return f"{value}, measured on {plain(quality.data)}.{loaded}{became}"


def comparison(report: Report) -> list[Row]:
    """Return the rows of the before/after table: the original, the artifact, one setting for all."""
    source, artifact, quality, uniform = report.source, report.artifact, report.quality, report.uniform
    taken = uniform.bytes if uniform else None
    width = 8 * source.bytes / source.parameters if source.parameters else None
    better = "lower is better" if quality.lower_is_better else "higher is better"
    rows = [
        Row("Size", size(source.bytes), size(artifact.bytes), size(taken)),
        Row("Ratio", "1×", ratio(artifact.ratio), ratio(source.bytes / taken if taken else None)),
        Row("Bits per weight", figures(width), figures(artifact.bits_per_weight), NOTHING),
        Row(
            f"{plain(quality.metric, 60)} ({better})",
            "reference",
            figures(quality.value),
            figures(quality.uniform),
        ),
        Row("  95th percentile", NOTHING, figures(quality.p95), NOTHING),
    ]
    if report.running:
        other = size(uniform.held) if uniform and known(uniform.held) else NOTHING
        rows.append(Row("In memory, running", size(source.bytes), size(report.running.held), other))
        rows.append(Row("  quality, running", "reference", figures(report.running.quality), NOTHING))
    latency = report.latency or Latency()
    for label, before, after in (
        ("Latency", latency.original, latency.artifact),
        ("Load time", latency.load_original, latency.load_artifact),
    ):
        rows.append(Row(label, timed(before, latency.unit), timed(after, latency.unit), NOTHING))
    return rows


def verdict(report: Report) -> str:
    """State whether choosing site by site beat one setting for all."""
    quality, uniform = report.quality, report.uniform
    metric, value, other = plain(quality.metric, 60), figures(quality.value), figures(quality.uniform)
    if not report.sites:
        return "Nothing was compressed: all is stored as it was given." if report.cut is None else _cut(report.cut)
    if uniform is None:
        return "Methods were chosen site by site, and no single setting for all was measured."
    recovered = report.section("recovery") is not None
    named = f"{plain(uniform.method, 60)} ({setting(uniform.setting)})"
    if report.winner == "uniform":
        whole = uniform.sites is None or uniform.of is None or uniform.sites == uniform.of
        who = "every site has" if whole else f"{uniform.sites:,} of {uniform.of:,} sites have"
        rest = "" if whole else "; at the others it does not exist or saves nothing"
        moved = ", moved a little at some sites to use the budget" if uniform.moved else ""
        # The two were compared before the weights were corrected or taught.
        first = f"{other} when they were compared, " if known(quality.uniform) and other != value else ""
        last = (" after recovery" if recovered else " as it is stored") if first else ""
        return (
            f"Choosing site by site did not beat one setting for all, so {who} {named}{moved}{rest}: "
            f"{metric} {first}{value}{last}."
        )
    if not known(quality.uniform):
        return f"Methods were chosen site by site; the best single setting, {named}, was {NOT_MEASURED}."
    takes = f", which takes {size(uniform.held)} in memory" if known(uniform.held) else ""
    takes = takes or (f", which takes {size(uniform.bytes)}" if known(uniform.bytes) else "")
    return (
        f"Methods were chosen site by site: {metric} {value}{' after recovery' if recovered else ''}, against {other} "
        f"with the best single setting, {named}{takes}."
    )


def _cut(cut: CutTrials) -> str:
    """State what a cut alone removed."""
    gone = next((level.weights for level in cut.levels if level.share == cut.kept), 0)
    return (
        f"{plain(cut.name, 60)} removed {gone:,} of {cut.total:,} weights; the {cut.total - gone:,} that are left are "
        "stored as they are."
    )


def budget(report: Report) -> str:
    """State the requested budget and how much of it was used."""
    asked, used = report.budget, report.artifact.used
    if asked.asked == "none":
        return f"No budget was given; the files take {size(asked.bytes)}."
    if not asked.unit.startswith("bytes"):
        return f"Budget: {plain(asked.asked)}, in {plain(asked.unit)}; the artifact takes {size(asked.bytes)}."
    return f"Budget: {plain(asked.asked)}, at most {size(asked.bytes)}, of which {percent(used)} is used."


def cell(value: Cell) -> str:
    """A cell of a section's table, as text."""
    if isinstance(value, str):
        return plain(value)
    return f"{value:,}" if isinstance(value, int) else figures(value)


def table(report: Report) -> Table:
    """The before/after comparison, to be printed with a :class:`rich.console.Console`."""
    # Text, not str: rich would read "[bold]" in a name as markup.
    result = Table(
        title=Text(f"{plain(report.title)}: {headline(report)}"),
        caption=Text(f"{verdict(report)} {budget(report)}"),
        title_justify="left",
        caption_justify="left",
    )
    result.add_column("")
    for name in ("original", "octavo", "best uniform"):
        result.add_column(name, justify="right", style="bold" if name == "octavo" else None)
    for row in comparison(report):
        result.add_row(*(Text(text) for text in row))
    return result


def told(report: Report) -> list[Table | Text]:
    """What the target has to say, for the console: for every section its text, its table and its notes."""
    parts: list[Table | Text] = []
    for section in report.sections:
        parts += [Text(f"{plain(section.title)}: {plain(section.text, 2000)}")] if section.text else []
        if section.rows:
            shown = Table(title=Text(plain(section.title)))
            for column in section.columns:
                shown.add_column(Text(plain(column)))
            for row in section.rows:
                shown.add_row(*(Text(cell(value)) for value in row))
            parts.append(shown)
        parts += [Text(f"note: {plain(note, 400)}") for note in section.notes]
    return parts


def _mark(value: object, limit: int = 160) -> str:
    """Escape for markdown, so that names cannot add links, pictures or HTML."""
    return re.sub(r"([\\`*_\[\]<>|&~$])", r"\\\1", plain(value, limit))


def _base(source: Original) -> str:
    """A line of the card on the base of a delta."""
    if source.base is None:
        return ""
    return (
        f"- Base: {_mark(source.base)}; the difference to it is stored, the original size is that of the difference in "
        "16 bits, and loading needs it: octavo.load(path, base=...)\n"
    )


def _latency(report: Report) -> str:
    """A sentence of the card on what its latencies are."""
    return f" Latency and load time: {_mark(report.latency.note)}." if report.latency and report.latency.note else ""


def _card_section(section: Section) -> str:
    blocks = [f"## {_mark(section.title)}"]
    if section.text:
        blocks.append(_mark(section.text, 2000))
    if section.rows:
        head = [" | ".join(map(_mark, section.columns)), " | ".join(["---"] * len(section.columns))]
        body = [" | ".join(_mark(cell(value)) for value in row) for row in section.rows]
        blocks.append("\n".join(f"| {line} |" for line in head + body))
    if section.notes:
        blocks.append("\n".join(f"- Note: {_mark(note, 400)}" for note in section.notes))
    return "\n" + "\n\n".join(blocks) + "\n"


def card(report: Report) -> str:
    """A short model card for the folder of the artifact: Markdown, for ``README.md``."""
    source, calibration = report.source, report.calibration
    rows = "\n".join("| " + " | ".join(_mark(cell.strip()) for cell in row) + " |" for row in comparison(report))
    families = ", ".join(
        f"{_mark(name)} ({things(family.sites, 'site')}, {size(family.bytes)})"
        for name, family in report.families.items()
    )
    amount = f"{count(calibration.sequences)} sequences, {count(calibration.tokens)} tokens"
    command = script(report.command)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", command)), default=0))
    notes = by_kind(calibration.warnings, (row.name for row in report.sites))
    warnings = "".join(f"\n- Warning: {_mark(note, 400)}" for note in notes[:20])
    note = f"\n{_mark(report.artifact.note)}\n" if report.artifact.note else ""
    sections = "".join(map(_card_section, report.sections))
    return f"""---
library_name: octavo
tags:
- octavo
- compressed
---

# {_mark(report.title)}, compressed

**{_mark(headline(report).replace(" -> ", " → ", 1))}**

{_mark(verdict(report), 600)} {_mark(budget(report))}
{note}
| | Original | Octavo | Best uniform |
|---|---:|---:|---:|
{rows}

{_mark(measured(report.quality), 600)}{_latency(report)}

- Source: {_mark(source.path)}, {count(source.parameters)} parameters, {_mark(source.fingerprint)}
{_base(source)}- Methods: {families or "none"}
- Not compressed: {things(len(report.kept), "tensor")}
- Calibrated on {_mark(calibration.text)}: {amount}{warnings}
- Made by Octavo {_mark(report.octavo_version)} on {moment(report.created)}, seed {_mark(report.seed)}

{fence}sh
{command}
{fence}
{sections}"""
