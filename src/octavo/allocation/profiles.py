"""Rate-distortion curves of every site: the bytes and expected loss of each method and setting."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from octavo.errors import RequestError
from octavo.methods import Setting
from octavo.system.atomic import write_file
from octavo.system.paths import checked, reason
from octavo.system.sealed import sealed_json, unsealed_json

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
