"""The allocation of ALDS: groups and ranks of all layers that minimize the largest error.

With ``k`` groups of rank ``j`` a layer's matrix ``W = [W_1 ... W_k]`` of (f, columns) has the relative error

    |W - W'|_2 / |W|_2 <= eps(k, j) = sqrt(k) / |W|_2 * max_i sigma_{j+1}(W_i)

and takes ``j (k f + columns)`` coefficients. The authors' program leaves ``sqrt(k)`` out, and so does
:class:`RankedLayer` unless it is told otherwise. The goal is ``min max_l eps_l(k_l, j_l)`` within the budget. Two steps
alternate from several starts, and the best of all rounds is used:

1. With ``k`` fixed, the least common level ``eps`` is found by bisection: each layer takes the smallest rank with at
   most that error, or stays dense if that is as small. Sizes fall as the level rises.
2. With a layer's size ``b`` fixed, it takes the ``k`` of least error at ``j = floor(b / (k f + columns) + 1/2)``.

Source: Liebenwein et al. (2021), arXiv 2107.11442. Levels are bisected over the finite set of errors, so step 1 is
exact. One start always has a single group, so the result is never worse than plain SVD.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.errors import RequestError

#: Numbers of groups of the first starts: each layer uses the largest divisor of its channels up to that number.
_STARTS = (1, 3, 5, 7, 9)


@dataclass(frozen=True)
class RankChoice:
    """Groups and rank of one layer."""

    groups: int
    rank: int


@dataclass(frozen=True)
class Allocation:
    """The result of the allocation.

    Parameters
    ----------
    choices
        Groups and rank by layer; None for dense layers.
    error
        The largest relative error of all layers.
    elements
        Coefficients of all layers.
    """

    choices: dict[str, RankChoice | None]
    error: float
    elements: int


class RankedLayer:
    """A layer's matrix, and the errors and sizes of its decompositions; singular values are computed once.

    Parameters
    ----------
    matrix
        (f, columns), a convolution's as (f, c h w).
    channels
        ``c``, which groups split; it divides the columns.
    bound
        Whether errors include the factor ``sqrt(k)`` of the bound, as in the paper. The authors' program leaves it out.
    """

    def __init__(self, matrix: Tensor, channels: int, *, bound: bool = False) -> None:
        if channels < 1 or matrix.shape[1] % channels:
            raise RequestError(
                f"channels: {channels} do not divide the {matrix.shape[1]} columns of a layer's matrix; give a divisor"
            )
        self.matrix, self.channels, self.bound = matrix.detach().float(), channels, bound
        self.dense = matrix.numel()
        self.divisors = tuple(k for k in range(1, channels + 1) if channels % k == 0)
        self._errors: dict[int, Tensor] = {}

    def errors(self, groups: int) -> Tensor:
        """Relative errors of ranks 0, 1, ..., full, in falling order; the last is 0."""
        if groups not in self.divisors:
            raise RequestError(f"{groups} groups do not divide {self.channels} channels; choose from {self.divisors}")
        if groups not in self._errors:
            blocks = self.matrix.double().unflatten(1, (groups, -1)).transpose(0, 1)
            norm = float(torch.linalg.matrix_norm(self.matrix.double(), 2)) or 1.0
            largest = torch.linalg.svdvals(blocks).amax(0) * (math.sqrt(groups) if self.bound else 1.0)
            self._errors[groups] = torch.cat([largest / norm, torch.zeros(1, dtype=largest.dtype)])
        return self._errors[groups]

    def size(self, choice: RankChoice | None) -> int:
        """Number of stored coefficients."""
        return self.dense if choice is None else choice.rank * self._unit(choice.groups)

    def error(self, choice: RankChoice | None) -> float:
        """The relative error of a choice."""
        return 0.0 if choice is None else float(self.errors(choice.groups)[choice.rank])

    def within(self, groups: int, level: float) -> RankChoice | None:
        """The smallest rank, at least 1, with an error of at most ``level``; None if dense is as small."""
        choice = RankChoice(groups, max(1, int((self.errors(groups) > level).sum())))
        return choice if self.size(choice) < self.dense else None

    def of_size(self, size: int, allowed: Sequence[int]) -> int:
        """The groups of least error at about that size."""
        ranks = {k: min(max(1, int(size / self._unit(k) + 0.5)), len(self.errors(k)) - 1) for k in allowed}
        return min(ranks, key=lambda k: (float(self.errors(k)[ranks[k]]), k))

    def _unit(self, groups: int) -> int:
        return groups * self.matrix.shape[0] + self.matrix.shape[1]


def allocate_ranks(
    layers: Mapping[str, RankedLayer],
    budget: int,
    *,
    groups: Sequence[int] | None = None,
    starts: int = 15,
    rounds: int = 4,
    seed: int = 0,
) -> Allocation:
    """Groups and ranks that minimize the largest error.

    Parameters
    ----------
    layers
        Layers by name.
    budget
        The total number of coefficients allowed.
    groups
        Allowed numbers of groups, if they divide a layer's channels; any divisor by default. ``(1,)`` is plain
        truncated SVD under the same allocation.
    starts, rounds
        Number of starts, and of alternations from each.

    Raises
    ------
    RequestError
        If there are no layers, or the budget is below the smallest possible size.
    """
    if not layers:
        raise RequestError("layers: none are given to allocate coefficients to; give at least one")
    if starts < 1 or rounds < 1:
        raise RequestError(f"starts is {starts} and rounds is {rounds}; both must be at least 1")
    allowed = {
        name: [k for k in layer.divisors if groups is None or k in groups] or [1] for name, layer in layers.items()
    }
    generator = random.Random(seed)
    fixed = [{name: max(k for k in ks if k <= max(most, ks[0])) for name, ks in allowed.items()} for most in _STARTS]
    drawn = [{name: generator.choice(ks) for name, ks in allowed.items()} for _ in range(starts - len(_STARTS))]
    found: dict[tuple[int, ...], Allocation | None] = {}
    for start in (fixed + drawn)[:starts]:
        split = start
        for _ in range(rounds):
            key = tuple(split.values())
            if key in found:
                break
            found[key] = made = _leveled(layers, split, budget)
            if made is None:
                break
            split = {
                name: layer.of_size(layer.size(made.choices[name]), allowed[name]) for name, layer in layers.items()
            }
    feasible = [made for made in found.values() if made is not None]
    if not feasible:
        least = sum(min(layer.dense, layer.size(RankChoice(allowed[name][0], 1))) for name, layer in layers.items())
        raise RequestError(
            f"budget: {budget} coefficients are too few, as rank 1 in all layers takes {least}; give at least that"
        )
    return min(feasible, key=lambda made: (made.error, made.elements))


def _leveled(layers: Mapping[str, RankedLayer], groups: Mapping[str, int], budget: int) -> Allocation | None:
    """The allocation of the least common level within the budget; None if there is none."""
    levels = torch.cat([layer.errors(groups[name]) for name, layer in layers.items()]).unique()

    def at(number: int) -> Allocation:
        level = float(levels[number])
        choices = {name: layer.within(groups[name], level) for name, layer in layers.items()}
        error = max(layer.error(choices[name]) for name, layer in layers.items())
        return Allocation(choices, error, sum(layer.size(choices[name]) for name, layer in layers.items()))

    low, high = 0, len(levels) - 1
    if at(high).elements > budget:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if at(middle).elements <= budget else (middle + 1, high)
    return at(high)


def constant_ranks(layers: Mapping[str, RankedLayer], share: float) -> dict[str, RankChoice | None]:
    """A plain SVD with the same share of the full rank in every layer, for comparisons."""
    return _single({name: max(1, round(share * (len(layer.errors(1)) - 1))) for name, layer in layers.items()}, layers)


def energy_ranks(layers: Mapping[str, RankedLayer], share: float) -> dict[str, RankChoice | None]:
    """A plain SVD with the smallest ranks that keep the same share of every layer's energy, for comparisons."""
    squares = {name: layer.errors(1)[:-1].square() for name, layer in layers.items()}
    kept = {name: values.cumsum(0) / values.sum().clamp_min(1e-300) for name, values in squares.items()}
    return _single({name: 1 + int((values[:-1] < share).sum()) for name, values in kept.items()}, layers)


def _single(ranks: Mapping[str, int], layers: Mapping[str, RankedLayer]) -> dict[str, RankChoice | None]:
    """One group of these ranks; layers that would not shrink stay dense."""
    choices = {name: RankChoice(1, rank) for name, rank in ranks.items()}
    return {
        name: choice if layers[name].size(choice) < layers[name].dense else None for name, choice in choices.items()
    }
