"""Bytes that a plan leaves unused: the sites at which a finer point still fits."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from octavo.allocation.profiles import Point, Profile
from octavo.allocation.solver import PointTable, improvements, totals


def upgrades(
    profile: Profile, points: Mapping[str, Point], left: int, pinned: Collection[str] = ()
) -> list[tuple[str, Point]]:
    """Points of less expected loss that together fit into ``left`` bytes, best gain per byte first.

    A site may be raised more than once; its last point counts. If nothing is returned, no single point fits and lowers
    the expected loss.

    Parameters
    ----------
    points
        The chosen point of every site.
    pinned
        Sites whose form the user chose.
    """
    table, found = PointTable(profile, interpolate=False), list[tuple[str, Point]]()
    free = [row for row, curves in enumerate(table.rows) if not any(curve.site in pinned for curve in curves)]
    now = [totals(profile, table.rows[row], [tuple(points[curve.site] for curve in table.rows[row])]) for row in free]
    size, loss = (np.array([each[part][0] for each in now]) for part in (0, 1))
    for index, column in improvements(table.bytes[free], table.loss[free], size, loss, left):
        row = free[index]
        found += zip((curve.site for curve in table.rows[row]), table.points[row][column], strict=True)
    return found
