"""Rate-distortion curves of every site: what each method and setting would cost in bytes and in quality."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from octavo.artifact import pack
from octavo.calibrate import Evidence
from octavo.errors import RequestError
from octavo.methods import Method, Setting, get_method
from octavo.sites import Site

#: A method whose first point loses this many times more than the best known curve at the same bytes is not tried further
#: at that site.
SCREEN = 3.0
FORMAT = 1


@dataclass(frozen=True)
class Point:
    """One way to store one site.

    Parameters
    ----------
    method, setting
        What was done.
    bytes
        Stored bytes, from the code that writes the file.
    loss
        Expected increase of the whole model's loss (the objective's metric), before correction.
    estimated
        Whether bytes and loss were interpolated between two measured points of a method with a continuous setting.
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
    """All curves of a source, with what is needed to solve them for any budget.

    Parameters
    ----------
    fixed_bytes
        Bytes of everything that is no site, manifest and headers included.
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
        """The loss to expect of a point after correction by measured plans."""
        factor, exponent = self.correction.get(curve.group, (1.0, 1.0))
        return float(factor * loss**exponent) if loss > 0 else 0.0

    @property
    def smallest(self) -> int:
        """Bytes of the smallest artifact that the curves allow."""
        return self.fixed_bytes + sum(min(point.bytes for point in curve.points) for curve in self.curves)

    def save(self, path: Path) -> None:
        """Write as JSON."""
        data = {"octavo_profile": FORMAT, **asdict(self)}
        path.write_text(json.dumps(data), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read what :meth:`save` wrote."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data.pop("octavo_profile") != FORMAT:
                raise ValueError("another format version")
            curves = [
                Curve(c["site"], c["kind"], tuple(c["shape"]), [Point(**point) for point in c["points"]])
                for c in data.pop("curves")
            ]
            correction = {key: (float(a), float(b)) for key, (a, b) in data.pop("correction").items()}
            return cls(curves=curves, correction=correction, **data)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RequestError(f"{path}: not a profile that this version can read: {error}") from error


@dataclass(frozen=True)
class Window:
    """Bits per weight between which points are wanted; settings beyond are not encoded."""

    least: float = 0.0
    most: float = float("inf")
    #: Take every n-th setting.
    stride: int = 1


def profile_site(
    site: Site,
    weight: Tensor,
    evidence: Evidence,
    methods: Sequence[Method],
    window: Window,
    keep: Callable[[Method, Setting, Any], None] = lambda method, setting, packed: None,
) -> Curve:
    """Points of one site from all methods.

    Parameters
    ----------
    weight
        The site's matrix (rows, columns), float32.
    methods
        The first one sets the curve that the others are screened against.
    keep
        Called with every packed form, for callers that want to reuse one.
    """
    curve = Curve(site.name, site.kind, site.shape, [])
    for method in sorted(methods, key=lambda method: method.elastic is None):
        if not method.accepts(site):
            continue
        for setting, form in _walk(method, weight, evidence, window, curve):
            packed = pack(form)
            keep(method, setting, packed)
            loss = evidence.loss(form.dense() - weight)
            curve.points.append(Point(method.name, setting, packed.bytes, loss))
    return curve


def _walk(
    method: Method, weight: Tensor, evidence: Evidence, window: Window, curve: Curve
) -> Iterator[tuple[Setting, Any]]:
    """Settings of a method from the middle outwards, until they leave the window or turn out hopeless."""
    settings = method.settings(weight, evidence)
    if method.elastic is not None:
        settings = settings[:: window.stride] if len(settings) > 2 else settings
    start = len(settings) // 2
    reference = envelope(curve)
    seen: dict[int, tuple[float, float]] = {}

    def bits(index: int) -> float:
        return seen[index][0] * 8 / max(weight.numel(), 1)

    def order() -> Iterator[int]:
        yield start
        if not method.elastic and reference is not None and _hopeless(seen[start], reference):
            return
        index = start
        while index + 1 < len(settings) and bits(index) > window.least:
            index += 1
            yield index
        index = start
        while index > 0 and bits(index) < window.most:
            index -= 1
            yield index

    taken: list[int] = []

    def lazily() -> Iterator[Setting]:
        for index in order():
            taken.append(index)
            yield settings[index]

    for form in method.encode_all(weight, lazily(), evidence):
        yield settings[taken[-1]], form
        seen[taken[-1]] = (curve.points[-1].bytes, curve.points[-1].loss)


def _hopeless(point: tuple[float, float], reference: Callable[[float], float]) -> bool:
    size, loss = point
    return loss > SCREEN * reference(size)


def envelope(curve: Curve) -> Callable[[float], float] | None:
    """Loss as a function of bytes along the measured points, log-linear between them; None if there are too few."""
    points = sorted({(point.bytes, max(point.loss, 1e-300)) for point in curve.points})
    if len(points) < 2:
        return None
    sizes = np.array([size for size, _ in points], float)
    losses = np.minimum.accumulate(np.log([loss for _, loss in points]))
    return lambda size: float(np.exp(np.interp(size, sizes, losses)))


def densified(curve: Curve, between: int = 7) -> list[Point]:
    """The points of a curve, with estimated ones between neighbours of a method with a continuous setting.

    Step, bytes and loss are all close to exponential in each other over one gap, so logarithms are interpolated.
    """
    result = list(curve.points)
    for name in {point.method for point in curve.points}:
        knob = get_method(name).elastic
        if knob is None:
            continue
        points = sorted((p for p in curve.points if p.method == name), key=lambda p: p.setting[knob])
        for fine, coarse in zip(points, points[1:], strict=False):
            if coarse.bytes >= fine.bytes or fine.loss <= 0 or coarse.loss <= 0:
                continue
            ends = [np.log([p.setting[knob], p.bytes, p.loss]) for p in (fine, coarse)]
            for share in np.arange(1, between + 1) / (between + 1):
                step, size, loss = np.exp((1 - share) * ends[0] + share * ends[1])
                setting = {**fine.setting, knob: float(f"{step:.5g}")}
                result.append(Point(name, setting, round(float(size)), float(loss), estimated=True))
    return result


def interpolate(curve: Curve, method: str, value: float) -> Point:
    """The point of an elastic method at a knob's value, clamped to the measured range."""
    knob = get_method(method).elastic
    points = sorted((p for p in curve.points if p.method == method), key=lambda p: p.setting[knob])
    steps = [point.setting[knob] for point in points]
    place = bisect_left(steps, value)
    if place == 0 or place == len(points):
        return points[min(place, len(points) - 1)]
    fine, coarse = points[place - 1], points[place]
    share = np.log(value / steps[place - 1]) / np.log(steps[place] / steps[place - 1])
    mix = [np.log(max(p.bytes, 1)) * w for p, w in ((fine, 1 - share), (coarse, share))]
    size = float(np.exp(sum(mix)))
    loss = float(np.exp((1 - share) * np.log(max(fine.loss, 1e-300)) + share * np.log(max(coarse.loss, 1e-300))))
    return Point(method, {**fine.setting, knob: float(f"{value:.5g}")}, round(size), loss, estimated=True)
