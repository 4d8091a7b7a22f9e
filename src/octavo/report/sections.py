"""The sections of the page about the result and the run."""

import html

from octavo.report import pictures
from octavo.report.markup import Safe, bar, bars, folded, grid, items, join, paragraph, section
from octavo.report.schema import CurvePoint, Report, UniformPoint
from octavo.report.summary import budget, cell, comparison, measured, verdict
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
from octavo.system.records import plain_json

ROWS = 50


def outcome(report: Report) -> Safe:
    """Return the sizes as two bars, the verdict and the before/after table."""
    source, artifact = report.source, report.artifact
    strip = bars(
        (name, (bar(nbytes / max(source.bytes, artifact.bytes, 1), role, size(nbytes)),))
        for name, nbytes, role in (("Original", source.bytes, "muted"), ("Octavo", artifact.bytes, "accent"))
    )
    rows = [(row.label.strip(), *(_faint(cell) for cell in row[1:])) for row in comparison(report)]
    latency = report.latency
    how = (latency.note or "no note on how") if latency else f"{NOT_MEASURED} in this run"
    files = [(plain(name), size(nbytes)) for name, nbytes in list(artifact.files.items())[:ROWS]]
    left_out = len(artifact.files) - len(files)
    return section(
        "outcome",
        "Before and after",
        strip,
        paragraph(verdict(report)),
        paragraph(budget(report), " ", artifact.note),
        grid(("", "Original", "Octavo", "Best uniform"), rows, "compare"),
        paragraph(f"{measured(report.quality)} Latency and load time: {plain(how)}.", kind="note"),
        folded(
            f"The artifact: {things(len(artifact.files), 'file')}",
            grid(("File", "Size"), files),
            paragraph(f"{left_out:,} more are in the JSON file.", kind="note") if left_out else Safe(),
        ),
    )


def _faint(cell: str) -> Safe:
    return Safe(f'<span class="faint">{cell}</span>') if cell in ("–", NOT_MEASURED, "reference") else join(cell)


def _found(point: CurvePoint | UniformPoint) -> Safe:
    # Most points are not measured, so the table shows a dash.
    return _faint(figures(point.measured) if known(point.measured) else "–")


def of_target(report: Report) -> Safe:
    """Return the sections that the target contributes."""
    parts = []
    for own in report.sections:
        rows = [[cell(value) for value in row] for row in own.rows]
        parts.append(
            section(
                own.name,
                own.title,
                paragraph(plain(own.text, 2000)) if own.text else Safe(),
                grid([plain(column) for column in own.columns], rows, "stack") if rows else Safe(),
                items([plain(note, 400) for note in own.notes], "warnings") if own.notes else Safe(),
            )
        )
    return Safe("\n".join(parts))


def tradeoff(report: Report) -> Safe:
    """Return the rate-quality curve with its numbers."""
    line = report.curve
    points: list[tuple[Safe, CurvePoint | UniformPoint]] = [(join("site by site"), point) for point in line.points]
    for p in line.uniform:
        how = Safe(f" <small>{join(setting(p.setting))}</small>")
        points.append((join(plain(p.method, 60), how), p))
    rows = [
        (choice, ratio(point.ratio), size(point.bytes), figures(point.expected), _found(point))
        for choice, point in points[: 4 * ROWS]
    ]
    caption = (
        "The line is the expected loss of the best choice site by site; single marks are one method with one setting "
        "for every site. Hollow marks were measured on held-out data, and the star is this artifact. Lower and "
        "further right is better."
    )
    if not report.quality.lower_is_better:
        caption = caption.replace(
            "Lower and further right is better.", "The lower axes show the measured quality, where higher is better."
        )
    return section(
        "tradeoff",
        "Size against quality",
        Safe(f"<figure>{pictures.curve(report)}</figure>"),
        paragraph(caption, kind="note"),
        folded(
            f"The numbers: {things(len(points), 'point')}",
            grid(("Choice", "Ratio", "Size", "Expected loss", "Measured"), rows, "dense"),
        ),
    )


def lengths(report: Report) -> Safe:
    """Return the histogram of bits per weight and the bytes by codec."""
    histogram, coding = report.code_lengths, {k: v for k, v in report.coding.items() if v}
    total = sum(coding.values())
    codecs = bars(
        (plain(name, 40), (bar(nbytes / total, "c1", f"{size(nbytes)}, {percent(nbytes, total)}"),))
        for name, nbytes in sorted(coding.items(), key=lambda item: -item[1])[:ROWS]
    )
    return section(
        "lengths",
        "Bits per weight",
        Safe(f"<figure>{pictures.lengths(report)}</figure>") if sum(histogram.weights) else paragraph("Not measured."),
        paragraph(f"Weights counted: {count(sum(histogram.weights))}.", kind="note"),
        Safe("<h3>Bytes by coding</h3>") if coding else Safe(),
        codecs,
    )


def calibration(report: Report) -> Safe:
    """Return the calibration data and its warnings."""
    facts = report.calibration
    warnings = facts.warnings
    shown = [*warnings[:ROWS], *([f"{len(warnings) - ROWS:,} more are in the JSON file"] if warnings[ROWS:] else [])]
    return section(
        "calibration",
        "Calibration data",
        paragraph(f"{plain(facts.text)}: {count(facts.sequences)} sequences, {count(facts.tokens)} tokens."),
        items(shown, "warnings") if shown else paragraph("No warnings.", kind="note"),
    )


def effort(report: Report) -> Safe:
    """Return the time and the memory the run took."""
    timings = dict(report.timings)
    total = timings.pop("total", None)
    whole = max([sum(value for value in timings.values() if known(value)), total if known(total) else 0]) or 1
    return section(
        "effort",
        "Time and memory",
        paragraph(f"Total time: {duration(total)}. Peak memory: {size(report.peak_memory)}."),
        bars(
            (plain(name, 40), (bar(seconds / whole if known(seconds) else 0, "c1", duration(seconds)),))
            for name, seconds in list(timings.items())[:ROWS]
        ),
    )


def reproduction(report: Report) -> Safe:
    """Return everything needed to repeat the run."""
    source = report.source
    dtypes = ", ".join(f"{name} ({count(number)})" for name, number in source.dtypes.items())
    facts = [
        ("Source", source.path),
        ("Fingerprint", source.fingerprint),
        ("Parameters", f"{count(source.parameters)}: {dtypes}"),
        ("Preset", report.preset),
        ("Seed", report.seed),
        ("Octavo", report.octavo_version),
        *((str(name).replace("_", " "), value) for name, value in plain_json(report.environment).items()),
        ("Created", moment(report.created)),
    ]
    return section(
        "reproduction",
        "How to reproduce",
        Safe(f"<pre><code>{html.escape(script(report.command))}</code></pre>"),
        grid(("", ""), [(plain(name, 40), plain(value)) for name, value in facts], "facts"),
    )
