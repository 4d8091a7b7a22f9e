"""The largest entries of a vector, looked up again and again while a payload is brought to its size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

#: Entries of a sample, and how many of them beyond its share make it sure that enough others are as large.
_SAMPLE, _SURE = 1 << 14, 64
#: Elements that are looked at in one go, few enough for a processor's cache.
_PIECE = 1 << 17
#: How far below a threshold entries are kept for the next one.
_LOWER = 0.8


class Large:
    """The entries of a vector that are large; one pass finds them for thresholds and amounts that are near each other.

    Parameters
    ----------
    flat
        (elements,) float32.
    """

    def __init__(self, flat: Tensor) -> None:
        self.elements = len(flat)
        self._flat, self._floor = flat, math.inf
        self._places, self._values, self._sizes = torch.zeros(0, dtype=torch.long), flat[:0], flat[:0]

    @cached_property
    def top(self) -> float:
        """The largest magnitude; 0 without entries."""
        return max(abs(float(end)) for end in self._flat.aminmax()) if len(self._flat) else 0.0

    def above(self, threshold: float) -> tuple[Tensor, Tensor]:
        """Places, rising, and values of entries of at least that magnitude, which is above zero."""
        if threshold < self._floor:
            self._look(threshold * _LOWER)
        return self._chosen(self._sizes >= threshold)

    def largest(self, amount: int) -> tuple[Tensor, Tensor]:
        """Places, rising, and values of so many entries of largest magnitude; of equal ones the first, and no zeros."""
        if amount > len(self._places) and self._floor:
            self._look(self._below(amount))
        if amount > len(self._places) and self._floor:
            self._look(0.0)
        amount = min(amount, len(self._places))
        if not amount:
            return self._places[:0], self._values[:0]
        last = _ranked(self._sizes, len(self._sizes) - amount)
        chosen = self._sizes > last
        level = _true(self._sizes == last)
        chosen[level[: amount - int(chosen.sum())]] = True
        return self._chosen(chosen)

    def _look(self, floor: float) -> None:
        """Keep the entries of at least that magnitude, and no zeros."""
        masks = (piece.abs() >= floor if floor else piece != 0 for piece in self._flat.split(_PIECE))
        found = [_true(mask) + number * _PIECE for number, mask in enumerate(masks)]
        self._floor, self._places = floor, torch.cat(found)
        self._values = self._flat[self._places]
        self._sizes = self._values.abs()

    def _below(self, amount: int) -> float:
        """A magnitude that so many entries exceed, most likely; 0 where that is not sure."""
        sample = self._flat[:: -(-len(self._flat) // _SAMPLE)].abs()
        rank = math.ceil(1.1 * amount / len(self._flat) * len(sample)) + _SURE
        return _ranked(sample, len(sample) - rank) if rank <= len(sample) else 0.0

    def _chosen(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        which = _true(mask)
        return self._places[which], self._values[which]


def largest(flat: Tensor, amount: int) -> Tensor:
    """Places of the entries of largest magnitude, in order; of equal ones the first, and no zeros."""
    return Large(flat).largest(amount)[0]


def largest_each(flat: Tensor, sizes: Sequence[int], amount: int) -> Tensor:
    """Places as of :func:`largest`, of every block about the same share; together ``amount`` but for rounding."""
    return of_each([Large(part) for part in flat.split(list(sizes))], amount)[0]


def of_each(parts: Sequence[Large], amount: int) -> tuple[Tensor, Tensor]:
    """Places and values of the largest entries of parts that follow each other, about the same share of every part."""
    share, start, found = amount / max(sum(part.elements for part in parts), 1), 0, list[tuple[Tensor, Tensor]]()
    for part in parts:
        places, values = part.largest(round(share * part.elements))
        found.append((places + start, values))
        start += part.elements
    return torch.cat([places for places, _ in found]), torch.cat([values for _, values in found])


def _true(mask: Tensor) -> Tensor:
    """Where a mask is true; NumPy finds it several times as fast."""
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def _ranked(sizes: Tensor, rank: int) -> float:
    """The value of that place in rising order; NumPy finds it sooner."""
    return float(np.partition(sizes.numpy(), rank)[rank])
