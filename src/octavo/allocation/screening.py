"""Which methods and settings are within reach of a budget, found at a few sites of every kind.

Most points of a curve are never chosen: a budget needs one slope, and a site's points far from that slope only take
time. So a few sites of every kind, the pilots, get whole curves. They are solved for budgets around the one that was
asked for. What is chosen there, or is nearly as good, is tried at the other sites of that kind; everything else is not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import replace

from octavo.allocation.budget import Budget
from octavo.allocation.profiles import Curve, Point, Profile, envelope
from octavo.allocation.solver import PointTable, solve, uniform
from octavo.allocation.windows import Reach
from octavo.methods import get_method
from octavo.sources.sites import Site

#: One of so many sites of a role, such as the queries of all layers, is a pilot.
_EVERY = 8
#: Shares of the budget for which pilots are solved; near the budget settings are tried without gaps.
_SHARES = (0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0)
_NEAR = (0.85, 1.2)
#: A method whose best point loses this many times more than the best one at the same bytes is not within reach.
_CLOSE = 1.1
#: A site may lie this far, in bytes, beyond the points that pilots chose.
_BEYOND = 1.25


def pilots(sites: Sequence[Site], pinned: Collection[str] = ()) -> set[str]:
    """Names of some sites of every role, from different depths; all sites where there are few.

    The layers of one network have roles: sites whose names differ only in numbers.
    """
    found = set()
    for number, names in enumerate(_roles([site for site in sites if site.name not in pinned]).values()):
        count = math.ceil(len(names) / _EVERY)
        # The golden ratio spreads roles of one kind over the depth of the network.
        start = (0.5 + 0.618034 * number) % 1
        found |= {names[int((start + place) * len(names) / count)] for place in range(count)}
    return found


def _roles(sites: Sequence[Site]) -> dict[tuple[str, str], list[str]]:
    """Names of the sites of every role."""
    found: dict[tuple[str, str], list[str]] = {}
    for site in sites:
        found.setdefault((re.sub(r"\d+", "*", site.name), kind_of(site)), []).append(site.name)
    return found


def kind_of(site: Site) -> str:
    """The kind of a site, as :attr:`Curve.group` names it."""
    return Curve(site.name, site.kind, site.shape, []).group


def reaches(curves: Sequence[Curve], sites: Sequence[Site], bits: float) -> dict[str, dict[str, Reach]]:
    """For every kind of sites (:func:`kind_of`) the methods within reach, and their settings.

    Parameters
    ----------
    curves
        Those of the pilots.
    sites
        All sites that a plan is made for.
    bits
        The budget in bits per weight.
    """
    weights: dict[str, float] = {}
    for site in sites:
        weights[kind_of(site)] = weights.get(kind_of(site), 0.0) + site.parameters
    seen: dict[str, float] = {}
    for curve in curves:
        seen[curve.group] = seen.get(curve.group, 0.0) + math.prod(curve.shape)
    # Each pilot stands for the sites of its kind.
    stands = {curve.site: weights[curve.group] / seen[curve.group] for curve in curves}
    whole = Profile("", "", 0, 0, 0, [_times(curve, stands[curve.site]) for curve in curves])
    table, room, found = PointTable(whole), bits * sum(weights.values()) / 8, dict[str, dict[str, Reach]]()
    smallest = int(table.bytes.min(1).sum())
    chosen: dict[str, list[tuple[float, Point]]] = {curve.site: [] for curve in curves}
    for share in _SHARES:
        picked = solve(table.bytes, table.loss, max(int(share * room), smallest))
        for row, place in enumerate(picked):
            chosen[table.rows[row][0].site].append((share, table.points[row][place][0]))
    # One setting for all sites needs points at all of them.
    even = next((plan.points for plan in uniform(whole, Budget(int(room), ""))), None)
    # A site that is alone in its role, such as a head, is an example of nothing.
    measured = {curve.site for curve in curves}
    examples = {name for names in _roles(sites).values() if not measured.issuperset(names) for name in names}
    for curve in (curve for curve in curves if curve.site in examples):
        own = found.setdefault(curve.group, {})
        for share, point in chosen[curve.site]:
            _include(own, point, near=_NEAR[0] <= share <= _NEAR[1])
        if even is not None:
            _include(own, even[curve.site], near=True)
        sizes = [point.bytes / stands[curve.site] for _, point in chosen[curve.site]]
        for name in sorted({point.method for point in curve.points}):
            # Compared with all others, since a point of its own is always as good as itself.
            best = envelope(replace(curve, points=[point for point in curve.points if point.method != name]))
            if best is None:
                continue
            for point in curve.points:
                within = min(sizes) / _BEYOND <= point.bytes <= max(sizes) * _BEYOND
                if point.method == name and within and point.loss <= _CLOSE * best(point.bytes):
                    _include(own, point, near=False)
    return found


def _times(curve: Curve, count: float) -> Curve:
    """A curve that stands for several sites."""
    points = [replace(point, bytes=round(point.bytes * count), loss=point.loss * count) for point in curve.points]
    return replace(curve, points=points)


def _include(reaches: dict[str, Reach], point: Point, *, near: bool) -> None:
    method = get_method(point.method)
    place = method.octaves(point.setting) if method.elastic else 0.0
    reaches[method.name] = reaches.get(method.name, Reach(place, place)).including(place, near=near)
