"""Room that a plan leaves: which sites a finer point still fits at."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from octavo.allocation.profiles import Point, Profile


def upgrades(
    profile: Profile, points: Mapping[str, Point], left: int, pinned: Collection[str] = ()
) -> list[tuple[str, Point]]:
    """Points of less expected loss that fit into ``left`` bytes together, the best gain a byte first.

    A site may rise more than once; its last point is then what is meant. Where nothing is returned, no single point of
    any site fits and lowers the expected loss.

    Parameters
    ----------
    points
        The point of every site.
    pinned
        Sites that the user chose the form of.
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
                # What is smaller and better as well goes before everything else.
                worth = gain / max(more, 1)
                if more <= left and gain > 0 and worth > most:
                    best, most = (curve.site, point), worth
        if best is None:
            return found
        left -= best[1].bytes - now[best[0]].bytes
        now[best[0]] = best[1]
        found.append(best)
