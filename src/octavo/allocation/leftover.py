"""Bytes that a plan leaves unused: the sites at which a finer point still fits."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from octavo.allocation.profiles import Point, Profile


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
    now, found = dict(points), list[tuple[str, Point]]()
    curves = [curve for curve in profile.curves if curve.site not in pinned]
    while True:
        best, most = None, 0.0
        for curve in curves:
            old = now[curve.site]
            loss = profile.corrected(curve, old.loss)
            for point in curve.points:
                more = point.bytes - old.bytes
                gain = loss - profile.corrected(curve, point.loss)
                # Points that are both smaller and better come first.
                worth = gain / max(more, 1)
                if more <= left and gain > 0 and worth > most:
                    best, most = (curve.site, point), worth
        if best is None:
            return found
        left -= best[1].bytes - now[best[0]].bytes
        now[best[0]] = best[1]
        found.append(best)
