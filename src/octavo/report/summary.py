"""The main figures: one sentence, a console table and a model card."""

import re
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

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

NOTHING = "–"


class Row(NamedTuple):
    """One line of the before/after comparison."""

    label: str
    original: str
    artifact: str
    uniform: str


def headline(data: dict[str, Any]) -> str:
    """Return the result in one sentence.

    Parameters
    ----------
    data : dict
        The report.

    Returns
    -------
    str
        Such as ``90.87 MB -> 11.29 MB, 8.05x smaller, 1 - cosine 0.0031``.
    """
    source, artifact, quality, memory = data["source"], data["artifact"], data["quality"], data.get("running")
    sizes = f"{size(source['bytes'])} -> {size(artifact['bytes'])}"
    smaller = f"{ratio(artifact['ratio'])} smaller"
    if memory:
        sizes = f"{size(source['bytes'])} -> {size(memory['stated'])} in memory"
        smaller = f"{ratio(source['bytes'] / memory['stated'])} smaller"
    smaller = smaller.replace("×", "x")  # plain ASCII, for logs
    if not known(quality["value"]):
        return f"{sizes}, {smaller}, quality {NOT_MEASURED}"
    return f"{sizes}, {smaller}, {plain(quality['metric'], 60)} {figures(quality['value'])}"


def measured(data: dict[str, Any]) -> str:
    """State the data and the model of the quality measurement, or why there is none."""
    quality = data["quality"]
    loader, why = plain(quality.get("loader") or "", 120), plain(quality.get("why") or "", 300)
    loaded = f" The artifact was loaded with {loader}; nothing was missing." if loader else ""
    if not known(quality.get("value")):
        return f"Quality was {NOT_MEASURED}{': ' + why if why else ''}.{loaded}"
    value = f"{plain(quality.get('metric'), 60)} {figures(quality['value'])}"
    return f"{value}, measured on {plain(quality.get('data'))}.{loaded}"


def comparison(data: dict[str, Any]) -> list[Row]:
    """Return the rows of the before/after table: the original, the artifact, one setting for all."""
    source, artifact, quality, uniform = data["source"], data["artifact"], data["quality"], data["uniform"]
    smaller = source["bytes"] / uniform["bytes"] if uniform.get("bytes") else None
    width = 8 * source["bytes"] / source["parameters"] if source["parameters"] else None
    better = "lower is better" if quality["lower_is_better"] else "higher is better"
    rows = [
        Row("Size", size(source["bytes"]), size(artifact["bytes"]), size(uniform.get("bytes"))),
        Row("Ratio", "1×", ratio(artifact["ratio"]), ratio(smaller)),
        Row("Bits per weight", figures(width), figures(artifact["bits_per_weight"]), NOTHING),
        Row(
            f"{plain(quality['metric'], 60)} ({better})",
            "reference",
            figures(quality["value"]),
            figures(quality.get("uniform")),
        ),
        Row("  95th percentile", NOTHING, figures(quality.get("p95")), NOTHING),
    ]
    if data.get("running"):
        held = data["running"]["held"]
        other = size(uniform["held"]) if known(uniform.get("held")) else NOTHING
        rows.append(Row("In memory, running", size(source["bytes"]), size(held), other))
        rows.append(Row("  quality, running", "reference", figures(data["running"]["quality"]), NOTHING))
    latency = data.get("latency") or {}
    unit = latency.get("unit", "ms")
    for label, before, after in (
        ("Latency", "original", "artifact"),
        ("Load time", "load_original", "load_artifact"),
    ):
        rows.append(Row(label, timed(latency.get(before), unit), timed(latency.get(after), unit), NOTHING))
    return rows


def verdict(data: dict[str, Any]) -> str:
    """State whether choosing site by site beat one setting for all."""
    quality, uniform = data["quality"], data["uniform"]
    named = f"{plain(uniform.get('method'), 60)} ({setting(uniform.get('setting'))})"
    metric, value, other = plain(quality["metric"], 60), figures(quality["value"]), figures(quality.get("uniform"))
    if data["winner"] == "uniform":
        having, every = uniform.get("sites"), uniform.get("of")
        who = "every site has" if having == every else f"{having:,} of {every:,} sites have"
        rest = "" if having == every else "; at the others it does not exist or saves nothing"
        moved = ", moved a little at some sites to use the budget" if uniform.get("moved") else ""
        return (
            f"Choosing site by site did not beat one setting for all, so {who} {named}{moved}{rest}: {metric} {value}."
        )
    if not known(quality.get("uniform")):
        if not uniform:
            return "Methods were chosen site by site, and no single setting for all was measured."
        return f"Methods were chosen site by site; the best single setting, {named}, was {NOT_MEASURED}."
    takes = f", which takes {size(uniform['held'])} in memory" if known(uniform.get("held")) else ""
    takes = takes or (f", which takes {size(uniform['bytes'])}" if known(uniform.get("bytes")) else "")
    return (
        f"Methods were chosen site by site: {metric} {value}, against {other} with the best single setting, "
        f"{named}{takes}."
    )


def budget(data: dict[str, Any]) -> str:
    """State the requested budget and how much of it was used."""
    asked, used = data["budget"], data["artifact"]["used"]
    return f"Budget: {plain(asked['asked'])}, at most {size(asked['bytes'])}, of which {percent(used)} is used."


def running(data: dict[str, Any]) -> str:
    """State the memory, kernels and speed of an artifact made for memory; empty for other artifacts."""
    memory = data.get("running")
    if not memory:
        return ""
    kernels = "; ".join(f"{plain(name, 100)}: {things(number, 'site')}" for name, number in memory["kernels"].items())
    held, speed = size(memory["held"]), memory["speed"]
    said = f"Running from packed codes, the weights take {held} of memory ({size(memory['stated'])} were stated)."
    said += f" {kernels}." if kernels else ""
    if speed:
        ours, dense = (timed(1000 * speed[side], "ms") for side in ("packed", "dense"))
        said += f" {plain(speed['what']).capitalize()} takes {ours}, in bfloat16 dense {dense}."
    return f"{said} {plain(memory['note'])}".strip()


def table(data: dict[str, Any]) -> Table:
    """Return the before/after comparison for the console.

    Parameters
    ----------
    data : dict
        The report.

    Returns
    -------
    rich.table.Table
        To be printed with a :class:`rich.console.Console`.
    """
    # Text, not str: rich would read "[bold]" in a name as markup.
    result = Table(
        title=Text(f"{plain(data['title'])}: {headline(data)}"),
        caption=Text(f"{verdict(data)} {budget(data)} {running(data)}".strip()),
        title_justify="left",
        caption_justify="left",
    )
    result.add_column("")
    for name in ("original", "octavo", "best uniform"):
        result.add_column(name, justify="right", style="bold" if name == "octavo" else None)
    for row in comparison(data):
        result.add_row(*(Text(cell) for cell in row))
    return result


def _mark(value: object, limit: int = 160) -> str:
    """Escape for markdown, so that names cannot add links, pictures or HTML."""
    return re.sub(r"([\\`*_\[\]<>|&~$])", r"\\\1", plain(value, limit))


def _paragraph(text: str) -> str:
    return f"\n\n{_mark(text, 2000)}" if text else ""


def card(data: dict[str, Any]) -> str:
    """Return a short model card for the folder of the artifact.

    Parameters
    ----------
    data : dict
        The report.

    Returns
    -------
    str
        Markdown, for ``README.md``.
    """
    source, calibration = data["source"], data["calibration"]
    rows = "\n".join("| " + " | ".join(_mark(cell.strip()) for cell in row) + " |" for row in comparison(data))
    families = ", ".join(
        f"{_mark(name)} ({things(family['sites'], 'site')}, {size(family['bytes'])})"
        for name, family in data["families"].items()
    )
    amount = f"{count(calibration['sequences'])} sequences, {count(calibration['tokens'])} tokens"
    command = script(data["command"])
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", command)), default=0))
    notes = by_kind(calibration["warnings"], (row["name"] for row in data["sites"]))
    warnings = "".join(f"\n- Warning: {_mark(note, 400)}" for note in notes[:20])
    note = f"\n{_mark(data['artifact']['note'])}\n" if data["artifact"]["note"] else ""
    return f"""---
library_name: octavo
tags:
- octavo
- compressed
---

# {_mark(data["title"])}, compressed

**{_mark(headline(data).replace(" -> ", " → ", 1))}**

{_mark(verdict(data), 600)} {_mark(budget(data))}{_paragraph(running(data))}
{note}
| | Original | Octavo | Best uniform |
|---|---:|---:|---:|
{rows}

{_mark(measured(data), 600)}

- Source: {_mark(source["path"])}, {count(source["parameters"])} parameters, {_mark(source["fingerprint"])}
- Methods: {families or "none"}
- Not compressed: {things(len(data["kept"]), "tensor")}
- Calibrated on {_mark(calibration["text"])}: {amount}{warnings}
- Made by Octavo {_mark(data["octavo_version"])} on {moment(data["created"])}, seed {_mark(data["seed"])}

{fence}sh
{command}
{fence}
"""
