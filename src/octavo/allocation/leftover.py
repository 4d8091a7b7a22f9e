"""Bytes that a plan leaves unused: the sites at which a finer point still fits."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from octavo.allocation.profiles import Curve, Point, Profile, alike


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
    rows = [curves for curves in profile.joint() if not any(curve.site in pinned for curve in curves)]

    def total(curves: Sequence[Curve], chosen: Sequence[Point]) -> tuple[int, float]:
        """Bytes and expected loss of some sites."""
        losses = (profile.corrected(curve, point.loss) for curve, point in zip(curves, chosen, strict=True))
        return sum(point.bytes for point in chosen), sum(losses)

    while True:
        best, most = None, 0.0
        for curves in rows:
            size, loss = total(curves, [now[curve.site] for curve in curves])
            for chosen in alike([curve.points for curve in curves]):
                new, lost = total(curves, chosen)
                more, gain = new - size, loss - lost
                # Points that are both smaller and better come first.
                worth = gain / max(more, 1)
                if more <= left and gain > 0 and worth > most:
                    best, most = (curves, chosen, more), worth
        if best is None:
            return found
        left -= best[2]
        raised = [(curve.site, point) for curve, point in zip(best[0], best[1], strict=True)]
        now.update(raised)
        found += raised
