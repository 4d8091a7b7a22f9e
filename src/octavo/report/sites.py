"""The sections of the page about single sites: their bytes and losses."""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from octavo.report.markup import Safe, bar, bars, dotted, folded, grid, items, join, paragraph, section
from octavo.report.schema import FamilyTotal, KeptRow, Report, SiteRow, UnusedFamily
from octavo.report.text import count, figures, known, percent, plain, setting, shape, size, things

BARS = 25
ROWS = 400
NAMES = 40
HEADERS = ("Site", "Method", "Setting", "Bytes", "Original", "Bits per weight", "Expected loss")


class Group(NamedTuple):
    """Sites with the same role in different layers."""

    name: object
    bytes: float
    loss: float


def loss_of(site: SiteRow | FamilyTotal) -> float:
    """Return the expected loss of a site; zero if unknown."""
    return float(site.expected_loss) if known(site.expected_loss) else 0.0


def role(name: str) -> str:
    """Return the name of a site without the numbers of its layers, such as ``encoder.layer.*.output.dense.weight``."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def grouped(sites: Sequence[SiteRow]) -> list[Group]:
    """Return at most ``BARS`` groups by falling bytes, and one for the rest.

    A few sites are shown individually; many are grouped if their names differ only in numbers, like the layers of a
    network.
    """
    members: dict[str, list[SiteRow]] = defaultdict(list)
    for site in sites:
        members[site.name if len(sites) <= BARS else role(site.name)].append(site)

    def merge(name: object, part: list[SiteRow]) -> Group:
        return Group(name, sum(site.bytes for site in part), sum(map(loss_of, part)))

    ordered = sorted(members.items(), key=lambda item: -sum(site.bytes for site in item[1]))
    groups = [
        merge(join(dotted(name), Safe(f" <small>×&nbsp;{len(part)}</small>") if len(part) > 1 else ""), part)
        for name, part in ordered[:BARS]
    ]
    rest = [site for _, part in ordered[BARS:] for site in part]
    return [*groups, merge(f"the rest: {things(len(rest), 'site')}", rest)] if rest else groups


def spread(report: Report) -> Safe:
    """Return bars of bytes and of expected loss by site."""
    groups = grouped(report.sites)
    sizes, losses = [group.bytes for group in groups], [group.loss for group in groups]
    most_bytes, most_loss = max(sizes, default=0) or 1, max(losses, default=0) or 1
    rows = [
        (
            group.name,
            (
                bar(group.bytes / most_bytes, "c1", f"{size(group.bytes)} · {percent(group.bytes, sum(sizes))}"),
                bar(group.loss / most_loss, "c2", f"{figures(group.loss)} · {percent(group.loss, sum(losses))}"),
            ),
        )
        for group in groups
    ]
    note = "Largest first; the losses of a group are added up."
    if len(report.sites) > BARS:
        note = "Sites whose names differ only in layer numbers (*) are grouped. " + note
    return section(
        "spread",
        "Where the bytes and the loss are",
        bars(rows, ("Bytes", "Expected loss")) if rows else paragraph("No site was compressed."),
        paragraph(note, kind="note"),
    )


def families(report: Report) -> Safe:
    """Return the table of method families."""
    table = report.families
    total_bytes = sum(family.bytes for family in table.values())
    total_loss = sum(loss_of(family) for family in table.values())
    rows = [
        (
            plain(name, 40),
            count(family.sites),
            size(family.bytes),
            percent(family.bytes, total_bytes),
            figures(family.expected_loss),
            percent(family.expected_loss, total_loss),
        )
        for name, family in sorted(table.items(), key=lambda item: -item[1].bytes)[:NAMES]
    ]
    headers = ("Family", "Sites", "Bytes", "of all bytes", "Expected loss", "of all loss")
    others = [paragraph(_unused(name, found, len(report.sites))) for name, found in list(report.unused.items())[:NAMES]]
    return section("families", "By family of methods", grid(headers, rows, "stack"), *others)


def _unused(family: str, found: UnusedFamily, sites: int) -> str:
    """Why a family that was tried has no row."""
    reasons = []
    compared = found.sites - found.larger - found.exact
    if found.times:
        least, median = found.times
        reasons.append(
            f"in the bytes that {_these(found, compared)} given its best would "
            f"lose at least {figures(least)} times as much (median {figures(median)}), and comes nearest at "
            f"{plain(found.nearest, 80)}"
        )
    if found.larger:
        reasons.append(f"it has no setting in the bytes that {_these(found, found.larger)} given")
    if found.exact:
        reasons.append(f"what was chosen loses nothing in the bytes that {_these(found, found.exact)} given")
    tried = f"{plain(family, 40)} was tried at {things(found.sites, 'site')} and won none"
    rest = sites - found.sites
    # Where it is far behind at a few sites of a kind, it is not tried at the others of that kind.
    return f"{tried}: {'; '.join(reasons)}." + (f" It was not tried at the other {count(rest)}." if rest > 0 else "")


def _these(found: UnusedFamily, number: int) -> str:
    """The number of sites where a family was tried, with the matching verb."""
    if number == found.sites:
        return "this was" if number == 1 else "these were"
    return f"{count(number)} of these {'was' if number == 1 else 'were'}"


def _rows(sites: Sequence[SiteRow]) -> list[tuple[object, ...]]:
    return [
        (
            join(dotted(site.name), Safe(f" <small>{join(_about(site))}</small>")),
            join(plain(site.method, 40), Safe(f" <small>{join(plain(site.family, 40))}</small>")),
            plain(setting(site.setting), 60),
            size(site.bytes),
            size(site.original_bytes),
            figures(site.bits_per_weight),
            figures(site.expected_loss),
        )
        for site in sites
    ]


def _about(site: SiteRow) -> str:
    tied = ", ".join(map(str, site.tied))
    about = f"{plain(site.kind, 20)}, {shape(site.shape)}, {plain(site.form, 40)}"
    return f"{about}, shared with {plain(tied)}" if tied else about


def worst(report: Report) -> Safe:
    """Return the ten sites with the highest expected loss."""
    highest = sorted(report.sites, key=lambda site: -loss_of(site))[:10]
    whole = sum(map(loss_of, report.sites))
    note = f"Together {percent(sum(map(loss_of, highest)), whole)} of the expected loss of all sites."
    return section("worst", "The worst sites", paragraph(note), grid(HEADERS, _rows(highest), "stack"))


def every(report: Report) -> Safe:
    """Return the table of all sites, or of the largest when there are too many for a page."""
    sites = report.sites
    kept = set(sorted(range(len(sites)), key=lambda number: -sites[number].bytes)[:ROWS])
    shown = [site for number, site in enumerate(sites) if number in kept]
    left_out = len(sites) - len(shown)
    note = f"The {ROWS} largest of {len(sites):,}; {left_out:,} are left out here, and the JSON file has all of them."
    return section(
        "sites",
        "Every site",
        folded(
            things(len(sites), "site"),
            paragraph(note if left_out else "In the order of the model."),
            grid(HEADERS, _rows(shown), "stack"),
        ),
    )


def kept(report: Report) -> Safe:
    """Return what was not compressed, by reason."""
    reasons: dict[str, list[KeptRow]] = defaultdict(list)
    for tensor in report.kept:
        reasons[tensor.reason].append(tensor)
    ordered = sorted(reasons.items(), key=lambda item: -len(item[1]))
    parts = []
    for reason, tensors in ordered[:NAMES]:
        names: list[object] = [
            join(dotted(t.name), Safe(f" <small>{join(shape(t.shape), ', ', size(t.bytes))}</small>"))
            for t in tensors[:NAMES]
        ]
        if len(tensors) > NAMES:
            names.append(f"and {len(tensors) - NAMES:,} more in the JSON file")
        nbytes = size(sum(tensor.bytes for tensor in tensors))
        parts.append(folded(f"{plain(reason)} – {things(len(tensors), 'tensor')}, {nbytes}", items(names, "names")))
    if len(ordered) > NAMES:
        parts.append(paragraph(f"{len(ordered) - NAMES:,} more reasons are in the JSON file.", kind="note"))
    taken, before = sum(row.bytes for row in report.kept), sum(row.original_bytes for row in report.kept)
    whole = percent(taken, report.artifact.bytes)
    intro = f"{things(len(report.kept), 'tensor')}, {size(taken)} (before: {size(before)}), {whole} of the artifact."
    return section(
        "kept", "Not compressed, and why", paragraph(intro if parts else "Everything was compressed."), *parts
    )
