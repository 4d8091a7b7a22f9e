"""Rate-distortion curves of every site: the bytes and expected loss of each method and setting."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from octavo.allocation.counting import Counting
from octavo.allocation.sampling import Sample, sample_of, table_sample_of
from octavo.allocation.windows import Window
from octavo.artifact import Packed, Sized, pack
from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.methods import Method, Setting, get_method
from octavo.methods.base import NAMED, PRESETS
from octavo.methods.tables import is_table
from octavo.sources.sites import Site
from octavo.system.atomic import write_file
from octavo.system.paths import checked, reason
from octavo.system.sealed import sealed_json, unsealed_json

#: A method whose first point loses this many times more than the best known curve at the same bytes is not tried
#: further at that site.
SCREEN = 3.0
#: A method that loses less than this many times more is always tried further.
PROMISING = 1.15
#: Only from so many times the rows of a sample on are a table's settings compared on that sample.
_SMALLER = 2.0
FORMAT = 3


@dataclass(frozen=True)
class Point:
    """One way to store one site.

    Parameters
    ----------
    method, setting
        The method and its setting.
    bytes
        Stored bytes, from the code that writes the file; for the memory target the bytes while running.
    loss
        Expected increase of the whole model's loss (the objective's metric), before correction.
    estimated
        Whether bytes and loss were measured on a sample of the rows, or interpolated between two measured points of a
        method with a continuous setting.
    """

    method: str
    setting: Setting
    bytes: int
    loss: float
    estimated: bool = False


@dataclass
class Curve:
    """All points of a site."""

    site: str
    kind: str
    shape: tuple[int, ...]
    points: list[Point]

    @property
    def group(self) -> str:
        """Sites of one kind and shape share one correction."""
        return f"{self.kind} {'x'.join(map(str, self.shape))}"


@dataclass
class Profile:
    """All curves of a source, with everything needed to solve them for any budget.

    Parameters
    ----------
    fixed_bytes
        Bytes of everything that is not a site, including manifest and headers.
    correction
        Group to (factor, exponent): measured loss = factor * expected ** exponent.
    """

    title: str
    fingerprint: str
    original_bytes: int
    weights: int
    fixed_bytes: int
    curves: list[Curve]
    correction: dict[str, tuple[float, float]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def corrected(self, curve: Curve, loss: float) -> float:
        """The expected loss of a point after correction by measured plans; infinite if it is NaN."""
        return self.corrected_all(curve, [loss])[0]

    def corrected_all(self, curve: Curve, losses: Iterable[float]) -> list[float]:
        """The expected losses of many points of a curve, as :meth:`corrected` gives them."""
        factor, exponent = self.correction.get(curve.group, (1.0, 1.0))
        return [
            math.inf if math.isnan(loss) else float(factor * loss**exponent) if loss > 0 else 0.0 for loss in losses
        ]

    def joint(self) -> list[list[Curve]]:
        """The curves, those of sites that need the same setting together (:meth:`Counting.joined`)."""
        joined, found = self.options.get("joined", {}), dict[str, list[Curve]]()
        for curve in self.curves:
            found.setdefault(joined.get(curve.site, curve.site), []).append(curve)
        # If the user chose other settings for some of them, nothing is left to have in common.
        return [part for curves in found.values() for part in ([curves] if alike_at(curves) else [[c] for c in curves])]

    @property
    def smallest(self) -> int:
        """Bytes of the smallest artifact that the curves allow."""
        return self.fixed_bytes + sum(min(point.bytes for point in curve.points) for curve in self.curves)

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        write_file(path, sealed_json(path.parent, path.name, {"octavo_profile": FORMAT, **asdict(self)}))

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read what :meth:`save` wrote."""
        try:
            data = unsealed_json(path.parent, path.name, checked(path).read_bytes())
            if data.pop("octavo_profile") != FORMAT:
                raise ValueError("unknown format version")
            curves = [
                Curve(c["site"], c["kind"], tuple(c["shape"]), [Point(**point) for point in c["points"]])
                for c in data.pop("curves")
            ]
            correction = {key: (float(a), float(b)) for key, (a, b) in data.pop("correction").items()}
            return cls(curves=curves, correction=correction, **data)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RequestError(
                f"{path}: not a profile that this version can read: {reason(error)}; run octavo profile again"
            ) from error


def profile_site(
    site: Site,
    weight: Tensor,
    evidence: Evidence,
    methods: Sequence[Method],
    window: Window,
    keep: Callable[[Method, Setting, Any], None] = lambda method, setting, packed: None,
    target: Counting | None = None,
) -> Curve:
    """Points of one site from all methods.

    Parameters
    ----------
    weight
        The site's matrix (rows, columns), float32.
    methods
        The methods of the cheapest preset run first and set the curve that the others are screened against.
    keep
        Called with every packed form, so that callers can reuse it. For large matrices it holds only sizes.
    target
        What the bytes of a point are, and which settings are tried.

    Raises
    ------
    RequestError
        If a method cannot encode the matrix, or no method offers a form for it.
    """
    target = target or Counting()
    curve = Curve(site.name, site.kind, site.shape, [])
    sample = sample_of(weight, evidence)
    # As a matrix of its own a sample of a table must be one, too, or what is a gain on tables alone would not show.
    tried = sample and (table_sample_of(weight, evidence) or sample)
    for method in sorted(methods, key=lambda m: (not m.lossless, (*PRESETS, NAMED).index(m.preset), m.elastic is None)):
        if not method.accepts(site) or not window.tries(method):
            continue
        asked, method = method, method.at_site(site)
        try:
            if sample is not None and method.by_rows:
                for setting, form in _walk(method, sample.weight, sample.evidence, window, curve, target):
                    packed, loss = sample.packed(form, target.resident), sample.loss(form)
                    keep(asked, setting, packed)
                    curve.points.append(Point(str(asked), setting, target.bytes(packed), loss, estimated=True))
            elif _is_probed(method, tried, window, target):
                assert tried is not None
                for point, packed in _probed(method, str(asked), weight, evidence, tried, window, curve, target):
                    keep(asked, point.setting, packed)
            elif tried is None or method.by_curvature or _competitive(method, tried, curve, target):
                for setting, form in _walk(method, weight, evidence, window, curve, target):
                    packed = pack(form, target.resident)
                    keep(asked, setting, packed)
                    loss = evidence.loss(form.dense() - weight)
                    curve.points.append(Point(str(asked), setting, target.bytes(packed), loss))
        except RequestError as error:
            raise RequestError(f"site {site.name!r}: {error}") from error
    if not curve.points:
        names = ", ".join(map(str, methods))
        raise RequestError(f"site {site.name!r}: {names} cannot compress it; add another method, such as entropy")
    return curve


def _competitive(method: Method, sample: Sample, curve: Curve, target: Counting) -> bool:
    """Whether a method is as good as the curve so far, tried on a sample as a separate matrix.

    A method that uses all rows together is slow on a large matrix and rarely an improvement there.
    """
    settings, reference = target.offers(method, sample.weight, sample.evidence), envelope(curve)
    if reference is None or not settings:
        return bool(settings)
    form = method.encode(sample.weight, settings[len(settings) // 2], sample.evidence)
    whole = sample.grown(form) if is_table(*sample.weight.shape) else pack(form).bytes * sample.share
    return sample.loss(form) <= PROMISING * reference(whole)


def _is_probed(method: Method, sample: Sample | None, window: Window, target: Counting) -> bool:
    """Whether the settings of a method are compared on a sample of a table, and only one is tried on the whole."""
    if sample is None or window.bits is None or target.exhaustive or method.by_curvature:
        return False
    return is_table(*sample.weight.shape) and sample.share >= _SMALLER


def _probed(
    method: Method,
    name: str,
    weight: Tensor,
    evidence: Evidence,
    sample: Sample,
    window: Window,
    curve: Curve,
    target: Counting,
) -> Iterator[tuple[Point, Packed]]:
    """Points of a method that uses all rows together, from a sample of a table that is a table itself.

    A smaller table flatters such a method, since what it fits to all rows fits few rows better. So the setting nearest
    to the budget is tried on the whole, and shows by how much.
    """
    first, made = len(curve.points), list[Packed]()
    for setting, form in _walk(method, sample.weight, sample.evidence, window, curve, target):
        size = sample.grown(form)
        made.append(Packed(Sized(size), {name: [0, size] for name in form.tensors()}, form.meta(), {}))
        curve.points.append(Point(name, setting, size, sample.loss(form), estimated=True))
    found = curve.points[first:]
    if not found:
        return
    wanted = (window.bits or 0.0) * weight.numel() / 8
    place = min(range(len(found)), key=lambda index: abs(math.log((found[index].bytes + 1) / (wanted + 1))))
    form = method.encode(weight, found[place].setting, evidence)
    packed, loss = pack(form, target.resident), evidence.loss(form.dense() - weight)
    larger = target.bytes(packed) / max(found[place].bytes, 1)
    worse = loss / found[place].loss if found[place].loss > 0 else 1.0
    for index, point in enumerate(found):
        exact = index == place
        size = target.bytes(packed) if exact else round(point.bytes * larger)
        point = replace(point, bytes=size, loss=point.loss * worse, estimated=not exact)
        curve.points[first + index] = point
        yield point, packed if exact else replace(made[index], content=Sized(size))


def _walk(
    method: Method, weight: Tensor, evidence: Evidence, window: Window, curve: Curve, target: Counting
) -> Iterator[tuple[Setting, Any]]:
    """Settings of a method from the middle outwards, until they leave the window or are screened out.

    A target that runs few of them tries all: a budget is then used by knowing every choice.
    """
    settings = list(window.offered(method, target.offers(method, weight, evidence)))
    if not settings:
        return
    start = len(settings) // 2
    # Dense storage has few settings, and all are always tried. Other methods are not screened against it.
    dense = all(get_method(name).dense for name in {point.method for point in curve.points})
    # Nor are those within reach, of which only a part of the curve is there.
    reference = None if dense or method.dense or window.reaches(method) else envelope(curve)
    seen: dict[int, Point] = {}
    enough = lossless_bytes(curve)

    def bits(index: int) -> float:
        return seen[index].bytes * 8 / max(math.prod(curve.shape), 1)

    def excess(index: int) -> float:
        """Loss relative to the best curve so far at the same bytes."""
        if reference is None:
            return 0.0
        return math.inf if needless(index) else seen[index].loss / reference(seen[index].bytes)

    def needless(index: int) -> bool:
        """Whether a smaller point has no loss."""
        return seen[index].bytes >= enough

    def outwards(step: int, wanted: Callable[[int], bool]) -> Iterator[int]:
        index = start
        while 0 <= index + step < len(settings) and wanted(index):
            index += step
            yield index
            if index not in seen or (needless(index) and step < 0):
                return
            if not needless(index) and excess(index) > PROMISING and excess(index) > 0.95 * excess(index - step):
                return  # behind, and not catching up

    def order() -> Iterator[int]:
        if target.exhaustive:
            yield from range(len(settings))
            return
        yield start
        # A method may find that a setting it offered is not usable, and return no form.
        if start not in seen:
            return
        if needless(start) or excess(start) <= SCREEN:
            yield from outwards(1, lambda index: bits(index) > window.least)
            yield from outwards(-1, lambda index: bits(index) < window.most and not needless(index))

    taken: list[int] = []

    def lazily() -> Iterator[Setting]:
        for index in order():
            taken.append(index)
            yield settings[index]

    for form in method.encode_all(weight, lazily(), evidence):
        yield settings[taken[-1]], form
        seen[taken[-1]] = curve.points[-1]


def envelope(curve: Curve) -> Callable[[float], float] | None:
    """Loss as a log-linear function of bytes between the measured points; None if there are too few."""
    # Points with zero loss have no logarithm: the curve ends at the first of them.
    points = sorted({(point.bytes, point.loss) for point in curve.points if point.loss > 0})
    if len(points) < 2:
        return None
    sizes = np.array([size for size, _ in points], float)
    losses = np.minimum.accumulate(np.log([loss for _, loss in points]))
    enough = lossless_bytes(curve)
    return lambda size: 0.0 if size >= enough else float(np.exp(np.interp(size, sizes, losses)))


def lossless_bytes(curve: Curve) -> float:
    """The fewest bytes with zero loss at a site; infinite if there is no such point."""
    return min((point.bytes for point in curve.points if point.loss == 0), default=math.inf)


def alike(choices: Sequence[Sequence[Point]]) -> list[tuple[Point, ...]]:
    """Points of several curves of one method and setting: each a point of every curve."""
    if len(choices) == 1:
        return [(point,) for point in choices[0]]
    rest = [{(point.method, repr(point.setting)): point for point in points} for points in choices[1:]]
    keys = [(point, (point.method, repr(point.setting))) for point in choices[0]]
    return [(point, *(points[key] for points in rest)) for point, key in keys if all(key in points for points in rest)]


def alike_at(curves: Sequence[Curve]) -> bool:
    """Whether some method and setting was tried at all of these sites."""
    return bool(alike([curve.points for curve in curves]))


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
