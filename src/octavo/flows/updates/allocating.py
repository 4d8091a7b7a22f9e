"""Which codec, with which choice and how many bytes, serves each unit of an update: measured, then solved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from octavo.allocation.knapsack import knapsack
from octavo.allocation.solver import filled, solve
from octavo.coding.fields import Writer
from octavo.flows.filling import FILLED, most_within
from octavo.flows.schema import Schema
from octavo.flows.updates.base import UpdateCodec

#: Rooms at which units are measured, as powers of two of their even share.
_DOUBLINGS = (-3, -1, 0, 1, 3)
#: Shares of a room that are filled where it is only measured: among rooms that double, and for one alone.
ROUGHLY, CLOSELY = 0.6, 0.93
#: Parts of the error bound that the dynamic programme tells apart, as in the source.
BINS = 10_000


@dataclass(frozen=True)
class Unit:
    """Tensors that are encoded together: their numbers in the schema of the whole, and a schema of their own."""

    members: tuple[int, ...]
    schema: Schema


@dataclass(frozen=True)
class Tried:
    """A measured way to send a unit.

    Parameters
    ----------
    codec
        Its number among those that are tried; -1 sends nothing.
    choice, amount
        The codec's.
    bytes
        Bytes of its parts with their lengths.
    error
        Squared error.
    """

    codec: int
    choice: dict[str, Any]
    amount: int
    bytes: int
    error: float


@lru_cache(maxsize=16)
def units(schema: Schema, joined: int) -> tuple[Unit, ...]:
    """Every tensor of at least ``joined`` elements alone, and all others together."""
    alone = [(number,) for number, size in enumerate(schema.sizes) if size >= joined]
    rest = tuple(number for number, size in enumerate(schema.sizes) if size < joined)
    return tuple(Unit(members, _part(schema, members)) for members in [*alone, *([rest] if rest else [])])


@lru_cache(maxsize=16)
def whole(schema: Schema) -> tuple[Unit, ...]:
    """All tensors as one unit."""
    return (Unit(tuple(range(len(schema.names))), schema),)


def packed(
    codec: UpdateCodec,
    prepared: Any,
    schema: Schema,
    room: int,
    guess: int,
    choice: dict[str, Any],
    full: float = FILLED,
) -> tuple[int, bytes] | None:
    """The amount and the parts, each after its length, that fill ``room`` bytes; None if nothing fits."""

    def make(amount: int) -> bytes:
        writer = Writer()
        for part in codec.pack(prepared, schema, amount, choice):
            writer.block(part)
        return bytes(writer.data)

    return most_within(room, codec.most(schema), guess, make, full, codec.doubling)


def measured(
    flat: Tensor, schema: Schema, codecs: Sequence[UpdateCodec], rooms: Sequence[int], full: float
) -> list[Tried]:
    """Candidates for a vector (elements,): nothing, and each codec with each choice at each room."""
    found = [Tried(-1, {}, 0, 0, float(flat.double().square().sum()))]
    for number, codec in enumerate(codecs):
        for choice in codec.choices():
            prepared, guess = codec.prepare(flat, schema, choice, 0), 0
            for room in rooms:
                fit = packed(codec, prepared, schema, room, guess, choice, full)
                if fit is not None:
                    guess, data = fit
                    parts = [memoryview(part) for part in codec.pack(prepared, schema, guess, choice)]
                    error = float((flat.double() - codec.unpack(parts, schema, 0)).square().sum())
                    found.append(Tried(number, choice, guess, len(data), error))
    return found


def table(candidates: Sequence[Sequence[Tried]]) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and squared errors, (units, candidates); missing ones cost and lose beyond all others."""
    width = max(map(len, candidates))
    sizes = np.full((len(candidates), width), 2**62, np.int64)
    errors = np.full((len(candidates), width), np.inf)
    for row, found in enumerate(candidates):
        sizes[row, : len(found)] = [candidate.bytes for candidate in found]
        errors[row, : len(found)] = [candidate.error for candidate in found]
    return sizes, errors


def least_error(sizes: np.ndarray, errors: np.ndarray, room: int) -> np.ndarray:
    """The candidate of every unit, of least total error in ``room`` bytes: by a multiplier, or by bytes if better."""
    rows = np.arange(len(sizes))
    by_bytes = filled(sizes, errors, knapsack(sizes, errors, room), room)
    return min(solve(sizes, errors, room), by_bytes, key=lambda chosen: float(errors[rows, chosen].sum()))


def least_bytes(sizes: np.ndarray, errors: np.ndarray, bound: float, bins: int = BINS) -> np.ndarray:
    """The candidate of every unit, of fewest bytes within a bound of the total error: L-GreCo's dynamic programme.

    Errors are rounded up to ``bins`` parts of the bound. With one part more for every unit a choice that meets the
    bound exactly is found in spite of the rounding; the total error then exceeds the bound by at most ``units / bins``.

    Parameters
    ----------
    sizes, errors
        (units, candidates): as from :func:`table`.

    Returns
    -------
    numpy.ndarray
        (units,) indices; those of least error if the bound cannot be met.
    """
    rows, count = np.arange(len(sizes)), bins + len(sizes)
    shares = np.where(np.isfinite(errors), errors, 0) / (bound or 1.0) * bins
    steps = np.where(np.isfinite(errors) & (shares <= count), np.ceil(shares), count + 1).astype(np.int64)
    best, taken = np.zeros(count + 1), np.zeros((len(sizes), count + 1), np.int64)
    for row in rows:
        # Bytes of the units so far, by the error that they use up at most.
        least = np.full(count + 1, np.inf)
        for column, step in enumerate(steps[row]):
            if step <= count:
                trial = best[: count + 1 - step] + sizes[row, column]
                better = trial < least[step:]
                least[step:][better], taken[row, step:][better] = trial[better], column
        best = least
    if not np.isfinite(best[count]):
        return errors.argmin(1)
    chosen, place = errors.argmin(1), count
    for row in rows[::-1]:
        chosen[row] = taken[row, place]
        place -= int(steps[row, chosen[row]])
    return chosen


def rooms(share: float) -> list[int]:
    """Rooms at which a unit with an even share of so many bytes is measured."""
    return [max(int(share * 2.0**doubling), 1) for doubling in _DOUBLINGS]


def _part(schema: Schema, members: Sequence[int]) -> Schema:
    return Schema(
        tuple(schema.names[number] for number in members),
        tuple(schema.dtypes[number] for number in members),
        tuple(schema.shapes[number] for number in members),
    )
