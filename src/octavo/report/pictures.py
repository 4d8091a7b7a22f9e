"""The two pictures of the report, drawn with matplotlib as SVG that follows the page's colours.

Every picture is drawn twice, for a wide and for a narrow page, because an SVG that is merely
scaled down to a phone has unreadable labels.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from octavo.errors import MissingExtraError
from octavo.report.schema import BitsHistogram, CurvePoint, Report, UniformPoint
from octavo.report.text import figures, known, percent, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Matplotlib needs colours, but the page uses CSS variables. So each role is drawn in a unique colour, which is then
# replaced by its variable.
ROLES = ("ink", "muted", "rule", "accent", "c1", "c2", "c3", "c4", "c5", "c6")
COLOURS = {role: f"#0a0b{number:02x}" for number, role in enumerate(ROLES, 16)}
SERIES = ROLES[4:]
MARKERS = "osD^vPX<>"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "octavo",
    "font.size": 9.0,
    "text.parse_math": False,
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.edgecolor": COLOURS["rule"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["rule"],
    "grid.linewidth": 0.6,
    "xtick.color": COLOURS["rule"],
    "ytick.color": COLOURS["rule"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def curve(report: Report) -> str:
    """Return the rate-quality curve as inline SVG: loss (log scale) over compression ratio."""
    label = "Expected loss over compression ratio"
    extra = 0.0 if report.quality.lower_is_better else 2.0  # a second pair of axes
    return _pair("curve", label, 4.6 + extra, 4.4 + extra, lambda figure, narrow: _curve(figure, report, narrow))


def lengths(report: Report) -> str:
    """Return the histogram of bits per weight as inline SVG."""
    histogram = report.code_lengths
    label = "Share of the weights by bits per weight"
    return _pair("lengths", label, 3.1, 2.9, lambda figure, _: _lengths(figure, histogram))


def _pair(name: str, label: str, wide: float, narrow: float, draw: Callable[[Figure, bool], None]) -> str:
    """Draw for both widths of the page, with the heights ``wide`` and ``narrow`` in inches."""
    try:
        import matplotlib.style
        from matplotlib.figure import Figure
    except ImportError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        raise MissingExtraError("the HTML report needs matplotlib: pip install 'octavo[report]'") from error
    pictures = []
    for kind, width, height in (("wide", 9.0, wide), ("narrow", 4.1, narrow)):
        with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
            # The browser renders glyphs that matplotlib's font lacks.
            warnings.simplefilter("ignore", UserWarning)
            figure = Figure(figsize=(width, height), layout="constrained")
            draw(figure, kind == "narrow")
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        pictures.append(f'<div class="{kind}">{_inline(buffer.getvalue(), f"{name}-{kind}-", label)}</div>')
    return "".join(pictures)


def _inline(svg: str, prefix: str, label: str) -> str:
    """Turn a stand-alone SVG file into an element of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    box = re.search(r'viewBox="[^"]*"', svg)
    svg = re.sub(r"^<svg[^>]*>", f'<svg role="img" aria-label="{html.escape(label)}" {box[0] if box else ""}>', svg)
    # Ids of matplotlib count from one in every picture; only the referenced ones are needed.
    wanted = set(re.findall(r'href="#(\w+)"|url\(#(\w+)\)', svg))
    names = {name for pair in wanted for name in pair if name}
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in names else "", svg)
    svg = re.sub(r'(?:xlink:)?href="#', f'href="#{prefix}', svg).replace("url(#", f"url(#{prefix}")
    svg = re.sub(r"font-family:[^;\"]*;?", "", svg)
    for role, colour in COLOURS.items():
        svg = re.sub(rf"(fill|stroke): {colour}\b", rf"\1: var(--{role})", svg)
    return re.sub(r"\s*\n\s*", "\n", svg)


def _curve(figure: Figure, report: Report, narrow: bool) -> None:
    lines, chosen, quality = report.curve, report.curve.chosen, report.quality
    together = quality.lower_is_better
    loss, measured = _axes(figure, together, plain(quality.metric, 30))
    points: list[CurvePoint | UniformPoint] = [*lines.points, *lines.uniform]
    values = [p.expected for p in points] + [p.measured for p in points if together] + [chosen.quality] * together
    positive = [value for value in values if known(value) and value > 0]
    # A log scale has no zero, so a lossless point is drawn at the bottom.
    floor = min(positive, default=1e-6) / 2

    def show(points: Iterable[CurvePoint | UniformPoint], role: str, marker: str, label: str, line: str) -> None:
        style: dict[str, Any] = {"color": COLOURS[role], "marker": marker, "markersize": 4.5}
        drawn = sorted((p for p in points if known(p.expected)), key=lambda p: p.ratio)
        if drawn:
            heights = [max(p.expected or 0.0, floor) for p in drawn]
            loss.plot([p.ratio for p in drawn], heights, linestyle=line, linewidth=1.6, label=label, **style)
        hollow = style | {"markersize": 6.5, "markerfacecolor": "none", "linestyle": "none"}
        for p in drawn:
            if not known(p.measured):
                continue
            height = max(p.measured, floor) if together else p.measured
            if together:
                loss.plot([p.ratio] * 2, [max(p.expected or 0.0, floor), height], color=COLOURS[role], linewidth=0.8)
            measured.plot([p.ratio], [height], **hollow)

    show(lines.points, "ink", "o", "site by site", "-")
    methods = sorted({p.method for p in lines.uniform})
    for number, method in enumerate(methods):
        own = [p for p in lines.uniform if p.method == method]
        role, marker = SERIES[number % len(SERIES)], MARKERS[(number + 1) % len(MARKERS)]
        show(own, role, marker, f"{plain(method, 30)} everywhere", "none")
    if known(chosen.quality):
        height = max(chosen.quality, floor) if together else chosen.quality
        star: dict[str, Any] = {"marker": "*", "markersize": 15, "color": COLOURS["accent"], "zorder": 5}
        measured.plot([chosen.ratio], [height], linestyle="none", label="this artifact, measured", **star)
    _scales(loss, measured, together, not narrow)
    entries = [pair for axes in figure.axes for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    if entries:
        handles, labels = zip(*entries, strict=True)
        figure.legend(handles, labels, loc="outside lower center", ncols=2 if narrow else 4)


def _axes(figure: Figure, together: bool, metric: str) -> tuple[Axes, Axes]:
    """Return the axes of the expected loss and of the measured quality."""
    if together:
        axes = figure.subplots()
        axes.set_ylabel(f"loss ({metric}), log scale")
        return axes, axes
    # An accuracy does not fit a scale of losses, so it gets its own.
    loss, measured = figure.subplots(2, 1, sharex=True)
    loss.set_ylabel("expected loss, log scale")
    measured.set_ylabel(metric)
    return loss, measured


def _scales(loss: Axes, measured: Axes, together: bool, wide: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    number = FuncFormatter(lambda value, _: figures(value))
    loss.set_yscale("log")
    low, high = loss.get_ylim()
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    loss.yaxis.set_minor_locator(NullLocator())
    loss.yaxis.set_major_formatter(number)
    measured.xaxis.set_major_locator(MaxNLocator(9 if wide else 6, steps=[1, 2, 5, 10]))
    measured.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{figures(value)}×"))
    measured.set_xlabel("times smaller than the original")
    if not together:
        measured.yaxis.set_major_locator(MaxNLocator(5))
        measured.yaxis.set_major_formatter(number)


def _lengths(figure: Figure, histogram: BitsHistogram) -> None:
    from matplotlib.ticker import FuncFormatter

    weights, edges = list(histogram.weights), list(histogram.bins)
    if len(edges) == len(weights):  # left edges only
        edges.append(edges[-1] + (edges[-1] - edges[-2] if len(edges) > 1 else 1))
    total = sum(weights) or 1
    axes = figure.subplots()
    widths = [right - left for left, right in pairwise(edges)]
    axes.bar(edges[:-1], [w / total for w in weights], [0.9 * w for w in widths], align="edge", color=COLOURS["c1"])
    filled = [number for number, weight in enumerate(weights) if weight]
    if filled:
        axes.set_xlim(edges[filled[0]] - widths[0], edges[filled[-1] + 1] + widths[-1])
    axes.grid(visible=False, axis="x")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value).replace(".0", "")))
    axes.set_xlabel("bits per weight, scales and headers included")
    axes.set_ylabel("share of the weights")
