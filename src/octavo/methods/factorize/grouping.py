"""Rows of a table in blocks, each of a low rank of its own: which rows go together, and at which rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from octavo.calibration.evidence import Evidence, require_finite
from octavo.errors import RequestError
from octavo.methods.factorize import factors

#: Refinement ends when a round gains less than this share of the loss.
_GAIN = 1e-3


@dataclass(frozen=True)
class Block:
    """Some rows of a table: ``weight`` (rows, columns), what their errors cost, and their factors; None if whole."""

    weight: Tensor
    evidence: Evidence
    parts: factors.Factors | None


@dataclass(frozen=True)
class Grouping:
    """Which block every row is in, ``member`` (rows,) uint8, and each block's rank; the columns where it is whole."""

    member: Tensor
    ranks: tuple[int, ...]

    def blocks(self, weight: Tensor, evidence: Evidence) -> list[Block]:
        """Every block with the best factors of its rank."""
        found, weights = [], _weights(evidence).float()
        for number, rank in enumerate(self.ranks):
            rows, here = weight[self.member == number], weights[self.member == number]
            # What is cached depends on the columns alone, which are those of the whole.
            seen = Evidence(here, evidence.columns, evidence.samples, evidence.cache)
            found.append(Block(rows, seen, None if rank >= weight.shape[1] else factors.factors(rows, seen, rank)))
        return found


def grouped(weight: Tensor, evidence: Evidence, rank: int, blocks: int, rounds: int) -> Grouping:
    """Blocks of rows and their ranks, for as many coefficients as the factors of one SVD of ``rank`` have.

    Rows are sorted by weight and cut into blocks of equal size. A round of refinement fits the bases ``V_p`` of all
    blocks and works out what row ``i`` would cost in block ``p``, ``r[i] |B[i] - B[i] V_p V_p^T|^2`` with ``B = A L``
    and ``C = L L^T``. Left to themselves all rows would go to the block of most components, so a promotion has to be
    paid for by demotions: best first, by what a row gains or loses for each coefficient it takes or gives back, which
    is to say that all rows move at the one price of a coefficient at which no more of them are stored than before.
    For given bases no other dealing of as many coefficients costs less, so the loss falls from round to round.
    """
    rows, columns = weight.shape
    weights = _weights(evidence)
    member = torch.empty(rows, dtype=torch.int64)
    member[weights.argsort(descending=True, stable=True)] = torch.arange(rows) * blocks // rows
    sizes = member.bincount(minlength=blocks)
    ranks = _ranks(torch.zeros(blocks).double().index_add_(0, member, weights) / sizes, sizes, columns, rank)
    if rounds:
        # Rotated, which changes no distance, and scaled, so that no square is out of range.
        table = factors.whitened(weight, None, evidence.columns)
        points = table.left * table.values.sqrt()
        member, ranks = _refined(points / points.abs().max().clamp_min(1e-30), weights, member, ranks, columns, rounds)
    return Grouping(member.to(torch.uint8), tuple(ranks.tolist()))


def _weights(evidence: Evidence) -> Tensor:
    """Weights of the rows, float64, none of which is zero."""
    require_finite(evidence.rows)
    weights = evidence.rows.double()
    return weights.clamp_min(float(weights.max()) * 1e-9).clamp_min(1e-30)


def _ranks(means: Tensor, sizes: Tensor, columns: int, rank: int) -> Tensor:
    """Ranks proportional to mean weights, from 1 to the one at which a block is as well kept whole."""
    budget = rank * (int(sizes.sum()) + columns)

    def at(scale: float) -> tuple[Tensor, int]:
        ranks = (means * scale).clamp(1, columns).long()
        split = ranks * (sizes + columns) < sizes * columns
        count = torch.where(split, ranks * (sizes + columns), sizes * columns)
        return torch.where(split, ranks, columns), int(count.sum())

    least = at(0.0)[1]
    if least > budget:
        raise RequestError(
            f"groupreduce: rank 1 in each of {len(sizes)} blocks takes {least} coefficients, rank {rank} allows "
            f"{budget}; give a higher rank or fewer blocks"
        )
    low, high = -math.log2(float(means.max())), math.log2(2 * columns / float(means.min()))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if at(2.0**middle)[1] <= budget else (low, middle)
    return at(2.0**low)[0]


def _refined(
    points: Tensor, weights: Tensor, member: Tensor, ranks: Tensor, columns: int, rounds: int
) -> tuple[Tensor, Tensor]:
    """Members and ranks of the blocks that are left when rows have changed blocks until that gains no more."""
    best, kept = math.inf, (member, ranks)
    for _ in range(rounds + 1):
        cost = _costs(points, weights, member, ranks.tolist(), columns)
        total = float(cost.gather(1, member[:, None]).sum())
        if total >= best:
            break
        gain, best, kept = best - total, total, (member, ranks)
        if gain < _GAIN * total:
            break
        used, member = _dealt(cost, ranks, int(ranks[member].sum())).unique(return_inverse=True)
        ranks = ranks[used]
    return kept


def _costs(points: Tensor, weights: Tensor, member: Tensor, ranks: Sequence[int], columns: int) -> Tensor:
    """What every row costs in every block, (rows, blocks), with bases fitted to the rows that are there."""
    energy, cost = points.square().sum(1), torch.zeros(len(points), len(ranks))
    for number, rank in enumerate(ranks):
        if rank < columns:
            here = member == number
            right = factors.whitened(points[here], weights[here], None, rank).right
            cost[:, number] = energy - (points @ functional.normalize(right, dim=1).t()).square().sum(1)
    return cost.clamp_min_(0) * weights[:, None]


def _dealt(cost: Tensor, ranks: Tensor, budget: int) -> Tensor:
    """The block of every row that costs least at the lowest price of a coefficient that keeps the budget."""
    low, high = 0.0, float(cost.max())
    for _ in range(50):
        price = (low + high) / 2
        within = int(ranks[(cost + price * ranks).argmin(1)].sum()) <= budget
        low, high = (low, price) if within else (price, high)
    return (cost + high * ranks).argmin(1)
