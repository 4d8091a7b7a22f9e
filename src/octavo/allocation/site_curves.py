"""The curve of one site: which settings of every method are tried, and what each gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from octavo.allocation.counting import Counting
from octavo.allocation.profiles import Curve, Point, envelope, lossless_bytes
from octavo.allocation.sampling import Sample, sample_of, table_sample_of
from octavo.allocation.windows import Window
from octavo.artifact import Packed, Sized, pack
from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.methods import Method, Setting, get_method
from octavo.methods.base import NAMED, PRESETS
from octavo.methods.tables import is_table
from octavo.sources.sites import Site

#: A method whose first point loses this many times more than the best known curve at the same bytes is not tried
#: further at that site.
_SCREEN = 3.0
#: A method that loses less than this many times more is always tried further.
_PROMISING = 1.15
#: Only from so many times the rows of a sample on are a table's settings compared on that sample.
_SMALLER = 2.0


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
    return sample.loss(form) <= _PROMISING * reference(whole)


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
            if not needless(index) and excess(index) > _PROMISING and excess(index) > 0.95 * excess(index - step):
                return  # behind, and not catching up

    def order() -> Iterator[int]:
        if target.exhaustive:
            yield from range(len(settings))
            return
        yield start
        # A method may find that a setting it offered is not usable, and return no form.
        if start not in seen:
            return
        if needless(start) or excess(start) <= _SCREEN:
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
