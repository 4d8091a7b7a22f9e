"""The figures in docs/explanation/security.md, made from docs/results/fuzz.json and chaos.json. `python benchmarks/robustness_page.py`."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from common import RESULTS

from octavo.system.atomic import write_file

PAGE = RESULTS.parent / "explanation" / "security.md"
START, END = "<!-- figures: made by benchmarks/robustness_page.py -->", "<!-- end of figures -->"
#: What becomes of a mutant, as the page says it.
_VERDICTS = {
    "refused": "refused with one clear error",
    "foreign": "refused by another library before Octavo was asked",
    "same": "loaded as the unchanged artifact (the change had no effect)",
    "changed": "loaded as their newly signed manifest says",
    "told": "loaded with a warning that names the change",
}


def figures(fuzz: dict[str, Any], chaos: dict[str, Any]) -> str:
    """Two paragraphs and a list."""
    counts = Counter()
    for row in fuzz["by_seed"].values():
        counts.update(row)
    lines = [
        f"The last run of `make fuzz`: {fuzz['mutants']:,} mutants of {len(fuzz['by_seed'])} artifacts by "
        f"{len(fuzz['by_change'])} kinds of change, on {fuzz['created'][:10]}, Python {fuzz['machine']['python']}, "
        f"{fuzz['machine']['cpu_count']} cores. {fuzz['failing']} failed; a load took at most "
        f"{fuzz['peak_bytes_beyond_4_files'] / 1e6:.0f} MB beyond four times its files.",
        "",
    ]
    lines += [f"- {counts[verdict]:,} {text}" for verdict, text in _VERDICTS.items() if counts[verdict]]
    odd = sorted(set(counts) - set(_VERDICTS))
    lines += [f"- {counts[verdict]:,} failed: {verdict}" for verdict in odd]
    ends: Counter[str] = Counter()
    for row in chaos["counts"].values():
        ends.update(row)
    kinds = "; ".join(f"{count} {end}" for end, count in ends.most_common())
    lines += [
        "",
        f"The last run of `make chaos`: {chaos['trials']} trials, on {chaos['created'][:10]}, full disks as {chaos['disks']}. "
        f"{len(chaos['failures'])} failed: {kinds}.",
    ]
    return "\n".join(lines)


def write() -> None:
    """Put the figures into the page."""
    fuzz, chaos = (json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in ("fuzz", "chaos"))
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    write_file(PAGE, f"{before}{START}\n{figures(fuzz, chaos)}\n{END}{after}".encode())


if __name__ == "__main__":
    write()
