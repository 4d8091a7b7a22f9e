"""The plot of the README: quality against size, from docs/results/bench.json. `python benchmarks/front_plot.py`.

Writes docs/quality-by-size.svg. The file has its own background and follows the reader's choice of light or dark, so it
can be read on any page. The same rows give the same file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from bench_page import NAMES, front
from common import RESULTS
from models import TITLES

from octavo.system.atomic import write_file

FILE = RESULTS.parent / "quality-by-size.svg"
Row = dict[str, Any]
#: Ends of sizes in MB and of losses, the sizes that are written, and the words for the loss.
Axes = tuple[tuple[float, float], tuple[float, float], tuple[float, ...], str]

WIDTH, HEIGHT = 860, 400
#: Left, top, width and height of the panels, in pixels.
PANELS = ((62, 62, 350, 280), (490, 62, 350, 280))
AXES: dict[str, Axes] = {
    "minilm": ((5, 40), (1e-5, 1.0), (5, 8, 12, 20, 30), "1 − cosine to the original"),
    "smollm2": ((30, 160), (1e-3, 10.0), (30, 45, 65, 95, 140), "mean KL to the original"),
}
#: Colours on light and on dark ground: distinct for most colour-blind readers too.
COLOURS = {
    "octavo": ("#111111", "#ffffff"), "own": ("#6b7280", "#9ca3af"), "torchao": ("#b45309", "#f59e0b"),
    "quanto": ("#047857", "#34d399"), "hqq": ("#1d4ed8", "#7db2ff"), "llama_cpp": ("#a21caf", "#e879f9"),
    "auto_round": ("#b91c1c", "#f87171"), "nncf": ("#0e7490", "#22d3ee"), "llmcompressor": ("#4d7c0f", "#a3e635"),
    "gptqmodel": ("#9d174d", "#f472b6"),
}  # fmt: skip
#: Where each label stands: the point of the tool's front, counted from the smallest, and the shift from it in pixels.
LABELS = {
    ("minilm", "octavo"): (3, -10, 6, "end"), ("minilm", "hqq"): (-1, 0, 18, "end"), ("minilm", "quanto"): (0, 2, -8, "start"),
    ("minilm", "torchao"): (7, 4, -7, "start"), ("minilm", "own"): (-1, 0, -8, "end"),
    ("smollm2", "octavo"): (2, -10, 6, "end"), ("smollm2", "auto_round"): (2, -8, 14, "end"), ("smollm2", "own"): (-1, 0, 18, "end"),
    ("smollm2", "torchao"): (-1, -10, 4, "end"), ("smollm2", "llama_cpp"): (-1, 8, -6, "start"),
}  # fmt: skip
#: What the best rows of `own` are to a reader who has not seen the page.
SHOWN = NAMES | {"own": "plain GPTQ"}


class Panel:
    """One model's axes; sizes and qualities become pixels on logarithmic scales."""

    def __init__(self, model: str, box: tuple[int, int, int, int], axes: Axes, title: str) -> None:
        self.model, (self.left, self.top, self.width, self.height) = model, box
        self.title, (self.sizes, self.losses, self.ticks, self.label) = title, axes

    def x(self, size: float) -> float:
        """Pixels of a size in bytes."""
        return self.left + self.width * _share(size / 1e6, self.sizes)

    def y(self, loss: float) -> float:
        """Pixels of a quality; zero lies on the floor of the panel, which says so."""
        if loss <= 0:
            return self.top + self.height
        return self.top + (self.height - 16) * (1 - _share(loss, self.losses))

    def frame(self) -> list[str]:
        """Title, grid and ticks."""
        bottom, right = self.top + self.height, self.left + self.width
        parts = [
            _text(self.left, self.top - 22, self.title, "title"),
            _text(self.left, self.top - 7, f"{self.label}, lower is better", "note"),
            _text(right, bottom + 36, "MB, whole model", "note", "end"),
        ]
        for size in self.ticks:
            x = self.x(size * 1e6)
            parts += [_line([(x, self.top), (x, bottom)], "grid"), _text(x, bottom + 18, f"{size}", "note", "middle")]
        low, high = (round(math.log10(edge)) for edge in self.losses)
        for power in range(low, high + 1):
            y = self.y(10.0**power)
            parts += [
                _line([(self.left, y), (right, y)], "grid"),
                _text(self.left - 8, y + 4, _number(10.0**power), "note", "end"),
            ]
        parts += [
            _line([(self.left, bottom), (right, bottom)], "axis"),
            _text(self.left - 8, bottom + 4, "0", "note", "end"),
        ]
        return parts

    def tool(self, tool: str, rows: Sequence[Row]) -> list[str]:
        """The settings of a tool that none of its others beats, joined, and its name beside one of them."""
        best = sorted(front(list(rows)), key=lambda row: row["bytes"])
        places = [(self.x(row["bytes"]), self.y(row["quality"])) for row in best]
        radius = 4.0 if tool == "octavo" else 2.4
        parts = [_line(places, f"best {tool}")]
        for row, (x, y) in zip(best, places, strict=True):
            said = f"{SHOWN[tool]} {row['setting']}: {row['bytes'] / 1e6:.2f} MB, {row['quality']:.3g}"
            parts.append(
                f'<circle class="{tool}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{_escaped(said)}</title></circle>'
            )
        which, right, down, anchor = LABELS.get((self.model, tool), (0, 8, 4, "start"))
        x, y = places[min(which, len(places) - 1)]
        return [*parts, _text(x + right, y + down, SHOWN[tool], f"name {tool}", anchor)]


def _share(value: float, ends: tuple[float, float]) -> float:
    return math.log(value / ends[0]) / math.log(ends[1] / ends[0])


def _number(value: float) -> str:
    return f"{value:g}" if value >= 1e-4 else f"10⁻{'⁰¹²³⁴⁵⁶⁷⁸⁹'[-round(math.log10(value))]}"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_escaped(text)}</text>'


def _line(places: Sequence[tuple[float, float]], kind: str) -> str:
    return f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>'


def _style() -> str:
    """Colours on light ground, and those on dark ground for readers who chose it."""

    def colours(which: int) -> str:
        return " ".join(
            f"circle.{tool}, text.{tool} {{ fill: {pair[which]}; }} .best.{tool} {{ stroke: {pair[which]}; }}"
            for tool, pair in COLOURS.items()
        )

    return f"""<style>
text {{ font: 12px system-ui, sans-serif; }} .title {{ font-weight: 600; font-size: 14px; }} .name {{ font-weight: 600; }}
.ground {{ fill: #ffffff; }} .title {{ fill: #111111; }} .note {{ fill: #4b5563; }}
.grid {{ stroke: #e5e7eb; }} .axis {{ stroke: #6b7280; }} polyline {{ fill: none; stroke-width: 1; }}
circle {{ opacity: 0.75; }} .best {{ opacity: 0.7; }} .best.octavo {{ stroke-width: 2.5; opacity: 1; }} circle.octavo {{ opacity: 1; }}
{colours(0)}
@media (prefers-color-scheme: dark) {{
.ground {{ fill: #0d1117; }} .title {{ fill: #f3f4f6; }} .note {{ fill: #c3c9d2; }}
.grid {{ stroke: #262d37; }} .axis {{ stroke: #9ca3af; }}
{colours(1)}
}}
</style>"""


def drawing(rows: Sequence[Row], axes: Mapping[str, Axes], titles: Mapping[str, str]) -> str:
    """The whole SVG: a panel for each model that has axes, at most two."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img">',
        "<title>Quality against size: Octavo beside other tools</title>",
        _style(),
        f'<rect class="ground" width="{WIDTH}" height="{HEIGHT}" rx="6"/>',
    ]
    for (model, ends), box in zip(axes.items(), PANELS, strict=False):
        panel = Panel(model, box, ends, titles[model])
        mine = [row for row in rows if row["model"] == model and row["quality"] is not None]
        parts += panel.frame()
        for tool in sorted({row["tool"] for row in mine}, key=list(COLOURS).index, reverse=True):
            parts += panel.tool(tool, [row for row in mine if row["tool"] == tool])
    return "\n".join([*parts, "</svg>\n"])


def write() -> None:
    """Draw the rows of docs/results/bench.json."""
    rows = json.loads((RESULTS / "bench.json").read_text(encoding="utf-8"))
    write_file(FILE, drawing(rows, AXES, TITLES).encode())


if __name__ == "__main__":
    write()
