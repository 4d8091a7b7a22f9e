"""How long llama.cpp takes for a token by the types of tensors, and plans that are no slower than its own mixes.

Types differ in speed by three times, and the smallest loss often lies in slow ones. A mix of llama.cpp has
one K type for all matrices and a finer one for the head; where columns are no multiple of 256 another type takes its
place. What such mixes take at their sizes says how much time a plan of any size may take.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from octavo.allocation.budget import Budget
from octavo.allocation.knapsack import knapsack
from octavo.allocation.profiles import Curve, Point, Profile
from octavo.allocation.solver import PointTable, filled, solve
from octavo.coding.ggml import TYPES

#: Types of llama.cpp's mixes, and what it takes where their blocks do not divide the columns.
_MIXES = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0", "q8_0": "q8_0"}
#: The type of the head in all of them.
_HEAD = "q6_k"
#: Time of a weight of 16 bits; see :attr:`octavo.coding.ggml.BlockType.time`.
_WIDE = 2.2
#: Prices of time that are tried.
_STEPS = 20


def pace(profile: Profile, points: Mapping[str, Point]) -> float:
    """Time of a token, in weights of q4_0."""
    alone = _has_head(profile)
    return sum(_time(curve, points[curve.site], alone) for curve in profile.curves)


def limit(profile: Profile, asked: Budget) -> float:
    """The time of a mix of llama.cpp of that size, interpolated between sizes; infinite if types are missing.

    Its medium mixes lie between those of one type.
    """
    mixes = [mix for kind in _MIXES if (mix := _mix(profile, kind)) is not None]
    if not mixes:
        return math.inf
    known = sorted((sum(point.bytes for point in mix.values()), pace(profile, mix)) for mix in mixes)
    sizes, times = zip(*known, strict=True)
    return float(np.interp(asked.bytes - profile.fixed_bytes, sizes, times))


def lossless(profile: Profile, asked: Budget) -> bool:
    """Whether all matrices can be kept as they are: then nothing is gained by changing them."""
    exact = [min((p.bytes for p in curve.points if p.loss == 0), default=math.inf) for curve in profile.curves]
    return profile.fixed_bytes + sum(exact) <= asked.bytes


def quick(profile: Profile, asked: Budget) -> Profile:
    """The profile with no points but those of the best plan within bytes and time; itself if time does not matter.

    Bytes are a budget and time has a price, the same for all sites: the lowest at which the plan keeps to the limit.
    """
    most, table = limit(profile, asked), PointTable(profile, interpolate=False)
    room, rows = asked.bytes - profile.fixed_bytes, np.arange(len(table.rows))
    if math.isinf(most) or lossless(profile, asked) or int(table.bytes.min(1).sum()) > room:
        return profile
    alone = _has_head(profile)
    times = np.zeros_like(table.loss)
    for row, (curves, choices) in enumerate(zip(table.rows, table.points, strict=True)):
        pairs = (zip(curves, points, strict=True) for points in choices)
        times[row, : len(choices)] = [sum(_time(curve, point, alone) for curve, point in pair) for pair in pairs]

    def total(of: np.ndarray, chosen: np.ndarray) -> float:
        return float(of[rows, chosen].sum())

    def priced(price: float) -> np.ndarray:
        return solve(table.bytes, table.loss + price * times, room)

    chosen = table.solve(room)
    if total(times, chosen) > most:
        losses = table.loss[np.isfinite(table.loss) & (table.loss > 0)]
        low, high = (
            math.log(loss / time) for loss, time in ((losses.min() / 99, most), (99 * losses.max(), times.max() / 99))
        )
        for _ in range(_STEPS):
            middle = (low + high) / 2
            low, high = (low, middle) if total(times, priced(math.exp(middle))) <= most else (middle, high)
        price = table.loss + math.exp(high) * times
        found = [priced(math.exp(high)), filled(table.bytes, price, knapsack(table.bytes, price, room), room)]
        within = [choice for choice in found if total(times, choice) <= most]
        chosen = min(within or found, key=lambda choice: total(table.loss if within else times, choice))
    left = {
        curve.site: [point]
        for row, curves in enumerate(table.rows)
        for curve, point in zip(curves, table.points[row][chosen[row]], strict=True)
    }
    return replace(profile, curves=[replace(curve, points=left[curve.site]) for curve in profile.curves])


def _has_head(profile: Profile) -> bool:
    """Whether the head has a matrix of its own, and is not tied to the embedding."""
    return any(curve.kind == "head" for curve in profile.curves)


def _time(curve: Curve, point: Point, alone: bool) -> float:
    """Time of one matrix; nothing is multiplied with an embedding that has a head beside it."""
    if alone and curve.kind == "embedding":
        return 0.0
    kind = TYPES.get(point.setting.get("type", ""))
    return math.prod(curve.shape) * (_WIDE if kind is None else kind.time)


def _mix(profile: Profile, kind: str) -> dict[str, Point] | None:
    """A mix of llama.cpp; None if no matrix has a type."""
    found, alone = {}, _has_head(profile)
    for curve in profile.curves:
        head = curve.kind == "head" or (curve.kind == "embedding" and not alone)
        wanted = _HEAD if head else kind
        known = {point.setting["type"]: point for point in curve.points if "type" in point.setting}
        point = known.get(wanted) or known.get(_MIXES[wanted]) or min(curve.points, key=lambda point: point.loss)
        found[curve.site] = point
    return found if any("type" in point.setting for point in found.values()) else None
