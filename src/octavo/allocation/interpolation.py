"""Between the measured points of a curve: methods with a continuous knob are interpolated along it."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from octavo.allocation.profiles import Curve, Point
from octavo.methods import Method, get_method


@dataclass(frozen=True)
class Family:
    """Points of a method that differ only in its continuous knob, from fine to coarse.

    Between two of them, octaves and the logarithms of bytes and loss are nearly linear in each other, so they are
    interpolated.

    Parameters
    ----------
    knots
        (points, 3): octaves, and the logarithms of bytes and loss.
    """

    method: Method
    points: list[Point]
    knots: np.ndarray

    @classmethod
    def of(cls, method: Method, points: Sequence[Point]) -> Family:
        """The family of some points in any order."""
        points = sorted(points, key=lambda point: method.octaves(point.setting))
        octaves = [float(method.octaves(point.setting)) for point in points]
        sizes, losses = ([max(p.bytes, 1) for p in points], [max(p.loss, 1e-300) for p in points])
        return cls(method, points, np.stack([np.array(octaves), np.log(sizes), np.log(losses)], 1))

    @cached_property
    def octaves(self) -> list[float]:
        """The knob of every point."""
        return self.knots[:, 0].tolist()

    def densified(self, between: int) -> list[Point]:
        """Estimated points in every gap whose ends take fewer bytes for more loss."""
        shares = (np.arange(1, between + 1) / (between + 1))[:, None]
        found = []
        for place, (fine, coarse) in enumerate(pairwise(self.points)):
            if coarse.bytes < fine.bytes and fine.loss > 0 and coarse.loss > 0:
                knots = (1 - shares) * self.knots[place] + shares * self.knots[place + 1]
                sizes, losses = np.exp(knots[:, 1:]).T.tolist()
                settings = (self.method.at(fine.setting, octaves) for octaves in knots[:, 0].tolist())
                found += [
                    Point(fine.method, setting, round(size), loss, estimated=True)
                    for setting, size, loss in zip(settings, sizes, losses, strict=True)
                ]
        return found

    def bytes_at(self, octaves: float) -> int:
        """The bytes of :meth:`at`."""
        place, share = self._gap(octaves)
        if not share:
            return self.points[place].bytes
        return round(float(np.exp((1 - share) * self.knots[place, 1] + share * self.knots[place + 1, 1])))

    def at(self, octaves: float) -> Point:
        """The point at ``octaves``, clamped to the measured range."""
        place, share = self._gap(octaves)
        if not share:
            return self.points[place]
        fine, (knob, size, loss) = self.points[place], (1 - share) * self.knots[place] + share * self.knots[place + 1]
        setting = self.method.at(fine.setting, float(knob))
        return Point(fine.method, setting, round(float(np.exp(size))), float(np.exp(loss)), estimated=True)

    def _gap(self, octaves: float) -> tuple[int, float]:
        """The point before ``octaves``, and the share of the way to the next one; 0 beyond the ends."""
        place = bisect_left(self.octaves, octaves)
        if place == 0 or place == len(self.octaves):
            return min(place, len(self.octaves) - 1), 0.0
        low, high = self.octaves[place - 1 : place + 1]
        return place - 1, (octaves - low) / (high - low)


def densified(curve: Curve, between: int = 7) -> list[Point]:
    """The points of a curve, with estimated points between neighbours that differ only in a continuous setting."""
    return [*curve.points, *(point for found in _families(curve).values() for point in found.densified(between))]


def _families(curve: Curve) -> dict[str, Family]:
    """The families of all methods with a continuous knob, by all other settings."""
    methods = {name: get_method(name) for name in dict.fromkeys(point.method for point in curve.points)}
    found: dict[str, list[Point]] = {}
    for point in curve.points:
        if methods[point.method].elastic is not None:
            found.setdefault(_others(point, methods[point.method]), []).append(point)
    return {key: Family.of(methods[points[0].method], points) for key, points in found.items()}


def _others(point: Point, method: Method) -> str:
    """A key of a point's method and all settings except the continuous one."""
    return f"{point.method} {sorted((key, value) for key, value in point.setting.items() if key != method.elastic)}"


def family(curve: Curve, method: str) -> Family:
    """The points of a method with one continuous knob, from fine to coarse."""
    return next(found for found in _families(curve).values() if found.points[0].method == method)


def slope(curve: Curve, point: Point) -> float:
    """Change in bytes per octave of a point's continuous knob (negative), from the measured points around it."""
    method = get_method(point.method)
    found = _families(curve).get(_others(point, method))
    # At a high rate an octave is one bit per weight.
    fallback = -math.prod(curve.shape) / 8
    if found is None or len(found.points) < 2:
        return fallback
    places = found.octaves
    place = min(max(bisect_left(places, method.octaves(point.setting)), 1), len(places) - 1)
    fine, coarse = found.points[place - 1 : place + 1]
    if coarse.bytes >= fine.bytes:
        return fallback
    return point.bytes * math.log(coarse.bytes / fine.bytes) / (places[place] - places[place - 1])
