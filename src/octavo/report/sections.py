"""The sections of the page about the result and the run."""

import html
from typing import Any

from octavo.report import pictures
from octavo.report.markup import Safe, bar, bars, folded, grid, items, join, paragraph, section
from octavo.report.summary import budget, comparison, measured, running, verdict
from octavo.report.text import (
    NOT_MEASURED,
    count,
    duration,
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
)

ROWS = 50


def outcome(data: dict[str, Any]) -> Safe:
    """Return the sizes as two bars, the verdict and the before/after table."""
    source, artifact = data["source"], data["artifact"]
    strip = bars(
        (name, (bar(nbytes / max(source["bytes"], artifact["bytes"], 1), role, size(nbytes)),))
        for name, nbytes, role in (("Original", source["bytes"], "muted"), ("Octavo", artifact["bytes"], "accent"))
    )
    rows = [(row.label.strip(), *(_faint(cell) for cell in row[1:])) for row in comparison(data)]
    latency = data.get("latency")
    how = (latency.get("note") or "no note on how") if latency else f"{NOT_MEASURED} in this run"
    files = [(plain(name), size(nbytes)) for name, nbytes in list(artifact["files"].items())[:ROWS]]
    left_out = len(artifact["files"]) - len(files)
    return section(
        "outcome",
        "Before and after",
        strip,
        paragraph(verdict(data)),
        paragraph(budget(data), " ", artifact["note"]),
        paragraph(running(data)) if data.get("running") else Safe(),
        grid(("", "Original", "Octavo", "Best uniform"), rows, "compare"),
        paragraph(f"{measured(data)} Latency and load time: {plain(how)}.", kind="note"),
        folded(
            f"The artifact: {things(len(artifact['files']), 'file')}",
            grid(("File", "Size"), files),
            paragraph(f"{left_out:,} more are in the JSON file.", kind="note") if left_out else Safe(),
        ),
    )


def _faint(cell: str) -> Safe:
    return Safe(f'<span class="faint">{cell}</span>') if cell in ("–", NOT_MEASURED, "reference") else join(cell)


def _found(point: dict[str, Any]) -> Safe:
    # Most points are not measured, so the table shows a dash.
    return _faint(figures(point["measured"]) if known(point.get("measured")) else "–")


def tradeoff(data: dict[str, Any]) -> Safe:
    """Return the rate-quality curve with its numbers."""
    line = data["curve"]
    points = [(join("site by site"), point) for point in line["points"]]
    for p in line["uniform"]:
        how = Safe(f" <small>{join(setting(p['setting']))}</small>")
        points.append((join(plain(p["method"], 60), how), p))
    rows = [
        (choice, ratio(p["ratio"]), size(p["bytes"]), figures(p["expected"]), _found(p))
        for choice, p in points[: 4 * ROWS]
    ]
    caption = (
        "The line is the expected loss of the best choice site by site; single marks are one method with one setting "
        "for every site. Hollow marks were measured on held-out data, and the star is this artifact. Lower and "
        "further right is better."
    )
    if not data["quality"]["lower_is_better"]:
        caption = caption.replace(
            "Lower and further right is better.", "The lower axes show the measured quality, where higher is better."
        )
    return section(
        "tradeoff",
        "Size against quality",
        Safe(f"<figure>{pictures.curve(data)}</figure>"),
        paragraph(caption, kind="note"),
        folded(
            f"The numbers: {things(len(points), 'point')}",
            grid(("Choice", "Ratio", "Size", "Expected loss", "Measured"), rows, "dense"),
        ),
    )


def lengths(data: dict[str, Any]) -> Safe:
    """Return the histogram of bits per weight and the bytes by codec."""
    histogram, coding = data["code_lengths"], {k: v for k, v in data["coding"].items() if v}
    total = sum(coding.values())
    codecs = bars(
        (plain(name, 40), (bar(nbytes / total, "c1", f"{size(nbytes)}, {percent(nbytes, total)}"),))
        for name, nbytes in sorted(coding.items(), key=lambda item: -item[1])[:ROWS]
    )
    return section(
        "lengths",
        "Bits per weight",
        Safe(f"<figure>{pictures.lengths(data)}</figure>") if sum(histogram["weights"]) else paragraph("Not measured."),
        paragraph(f"Weights counted: {count(sum(histogram['weights']))}.", kind="note"),
        Safe("<h3>Bytes by coding</h3>") if coding else Safe(),
        codecs,
    )


def calibration(data: dict[str, Any]) -> Safe:
    """Return the calibration data and its warnings."""
    facts = data["calibration"]
    warnings = facts["warnings"]
    shown = [*warnings[:ROWS], *([f"{len(warnings) - ROWS:,} more are in the JSON file"] if warnings[ROWS:] else [])]
    return section(
        "calibration",
        "Calibration data",
        paragraph(f"{plain(facts['text'])}: {count(facts['sequences'])} sequences, {count(facts['tokens'])} tokens."),
        items(shown, "warnings") if shown else paragraph("No warnings.", kind="note"),
    )


def effort(data: dict[str, Any]) -> Safe:
    """Return the time and the memory the run took."""
    timings = dict(data["timings"])
    total = timings.pop("total", None)
    whole = max([sum(value for value in timings.values() if known(value)), total if known(total) else 0]) or 1
    return section(
        "effort",
        "Time and memory",
        paragraph(f"Total time: {duration(total)}. Peak memory: {size(data.get('peak_memory'))}."),
        bars(
            (plain(name, 40), (bar(seconds / whole if known(seconds) else 0, "c1", duration(seconds)),))
            for name, seconds in list(timings.items())[:ROWS]
        ),
    )


def reproduction(data: dict[str, Any]) -> Safe:
    """Return everything needed to repeat the run."""
    source = data["source"]
    dtypes = ", ".join(f"{name} ({count(number)})" for name, number in source["dtypes"].items())
    facts = [
        ("Source", source["path"]),
        ("Fingerprint", source["fingerprint"]),
        ("Parameters", f"{count(source['parameters'])}: {dtypes}"),
        ("Preset", data["preset"]),
        ("Seed", data["seed"]),
        ("Octavo", data["octavo_version"]),
        *((str(name).replace("_", " "), value) for name, value in data["environment"].items()),
        ("Created", moment(data["created"])),
    ]
    return section(
        "reproduction",
        "How to reproduce",
        Safe(f"<pre><code>{html.escape(script(data['command']))}</code></pre>"),
        grid(("", ""), [(plain(name, 40), plain(value)) for name, value in facts], "facts"),
    )
