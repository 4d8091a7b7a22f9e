"""The section of the page with a slider over the ratio, and the data that its script draws."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources

from octavo.report.markup import Safe, join, paragraph, section
from octavo.report.overlays import Overlay
from octavo.report.schema import Report
from octavo.report.stops import Explorer
from octavo.report.text import figures, known, plain
from octavo.system.records import plain_json

_TITLE = "Explore other sizes"
#: Text and controls; the script fills them.
_CONTROLS = """\
<noscript><p class="note">The slider needs JavaScript. The command octavo plan gives the same numbers.</p></noscript>
<div id="explorer-app" hidden>
<div class="dial">
<label for="explorer-ratio">Ratio</label>
<span id="explorer-brief" aria-hidden="true"></span>
<output id="explorer-shown" for="explorer-ratio"></output>
<input id="explorer-ratio" type="range" min="0" max="{last}" step="1" value="{start}">
</div>
<div class="ends"><span>{least}×</span><button type="button" id="explorer-back">Back to this artifact</button>\
<span>{most}×</span></div>
<dl class="tiles">
<div><dt>Expected loss <small>{metric}</small></dt><dd><data id="explorer-loss"></data></dd></div>
<div><dt>The plan takes</dt><dd><data id="explorer-bytes"></data> <small id="explorer-exact"></small></dd></div>
<div><dt>Budget</dt><dd><data id="explorer-budget"></data> <small id="explorer-used"></small></dd></div>
</dl>
<figure id="explorer-curve" role="img" aria-label="Expected loss over compression ratio, with the chosen ratio marked">\
</figure>
<ul id="explorer-legend" class="legend"></ul>
<h3 id="explorer-how">The command for this point</h3>
<pre><code id="explorer-command" aria-labelledby="explorer-how"></code></pre>
<p class="copy"><button type="button" id="explorer-copy">Copy</button> \
<span id="explorer-copied" role="status"></span></p>
<h3>Bytes by method</h3>
<div id="explorer-methods" class="bars"></div>
<h3>Bytes by site</h3>
<div id="explorer-sites" class="bars"></div>
<details id="explorer-every"><summary>{rows} at this ratio</summary><div class="scroll"><table class="stack">\
<thead><tr><th scope="col">Site</th><th scope="col">Method</th><th scope="col">Setting</th><th scope="col">Bytes</th>\
<th scope="col">Expected loss</th></tr></thead><tbody></tbody></table></div></details>
<h3><label for="explorer-file">Lay another report or points over the curve</label></h3>
<p class="note" id="explorer-accepts">A report.json, or a JSON list of points: \
<code>[{{"name": "other tool", "bytes": 12000000, "loss": 0.01}}]</code>. The file stays on this machine.</p>
<p><input id="explorer-file" type="file" accept=".json,application/json" multiple \
aria-describedby="explorer-accepts"></p>
<p id="explorer-status" role="status"></p>
</div>
<script type="application/json" id="explorer-data">{data}</script>"""


def section_of(report: Report, overlays: Sequence[Overlay] = ()) -> Safe:
    """Return the slider with its data, or the reason why there is none; nothing for reports that say neither."""
    found = report.explorer
    if not found.stops:
        return section("explorer", _TITLE, paragraph("There is no slider here. ", found.why)) if found.why else Safe()
    stops, start = found.stops, _start(report)
    controls = _CONTROLS.format(
        last=len(stops) - 1,
        start=start,
        least=f"{stops[0].ratio:g}",
        most=f"{stops[-1].ratio:g}",
        metric=join(plain(report.quality.metric, 60)),
        rows="Every site" if all(row.sites == 1 for row in found.rows) else "Sites by role",
        data=_embedded(report, overlays, start),
    )
    lead = (
        f"Drag the slider to see what another size would cost. Each of its {len(stops)} stops is a plan solved from "
        "the measured curves of all sites, as octavo plan solves it. Losses here are expected, not measured."
    )
    notes = [paragraph(plain(note, 400), kind="note") for note in found.notes]
    return section("explorer", _TITLE, paragraph(lead), *notes, Safe(controls))


def script() -> str:
    """The script that draws the section."""
    return resources.files("octavo.report").joinpath("explorer.js").read_text(encoding="utf-8")


def _start(report: Report) -> int:
    """The stop whose budget is closest to the one of this artifact."""
    stops = report.explorer.stops
    return min(range(len(stops)), key=lambda number: abs(stops[number].budget - report.budget.bytes))


def _embedded(report: Report, overlays: Sequence[Overlay], start: int) -> str:
    """The data as JSON that no markup can end."""
    chosen, quality = report.curve.chosen, report.quality
    own = known(chosen.quality) and quality.lower_is_better
    data = {
        **plain_json(_printable(report.explorer)),
        "start": start,
        "original": report.source.bytes,
        "source": report.source.fingerprint,
        "metric": plain(quality.metric, 60),
        "target": report.budget.target,
        "measured": [chosen.ratio, chosen.quality, figures(chosen.quality)] if own else None,
        "overlays": plain_json(list(overlays)),
    }
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _printable(found: Explorer) -> Explorer:
    """The plans with names that a page can show, wherever the report is from."""
    return replace(
        found,
        command=tuple(plain(piece, 2000) if piece else "" for piece in found.command),
        methods=tuple(plain(name, 60) for name in found.methods),
        settings=tuple(plain(name, 120) for name in found.settings),
        bars=tuple(plain(name) for name in found.bars),
        rows=tuple(replace(row, name=plain(row.name)) for row in found.rows),
    )
