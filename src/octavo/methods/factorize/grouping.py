"""Grouping the rows of a table into blocks, and choosing a rank for each block."""

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
class RowGroup:
    """Some rows of a table: ``weight`` (rows, columns), the cost of their errors, and their factors (None if dense)."""

    weight: Tensor
    evidence: Evidence
    parts: factors.Factors | None


@dataclass(frozen=True)
class Grouping:
    """The block of every row, ``member`` (rows,) uint8, and each block's rank (the number of columns if dense)."""

    member: Tensor
    ranks: tuple[int, ...]

    def blocks(self, weight: Tensor, evidence: Evidence) -> list[RowGroup]:
        """All blocks with the best factors of their rank."""
        found, weights = [], _weights(evidence).float()
        for number, rank in enumerate(self.ranks):
            rows, here = weight[self.member == number], weights[self.member == number]
            # The cache depends only on the columns, which are those of the whole table.
            seen = Evidence(here, evidence.columns, evidence.samples, evidence.cache)
            found.append(RowGroup(rows, seen, None if rank >= weight.shape[1] else factors.factors(rows, seen, rank)))
        return found


def grouped(weight: Tensor, evidence: Evidence, rank: int, blocks: int, rounds: int) -> Grouping:
    """Blocks of rows and their ranks, with as many coefficients as the factors of one SVD of ``rank``.

    Rows are sorted by weight and split into blocks of equal size. A refinement round fits the bases ``V_p`` of all
    blocks and computes the cost of row ``i`` in block ``p``, ``r[i] |B[i] - B[i] V_p V_p^T|^2`` with ``B = A L`` and
    ``C = L L^T``. Without a constraint all rows would move to the block with most components. So rows are assigned at
    one price per coefficient, chosen such that no more coefficients are stored than before. For given bases no
    assignment with as many coefficients costs less, so the loss falls from round to round.
    """
    rows, columns = weight.shape
    weights = _weights(evidence)
    member = torch.empty(rows, dtype=torch.int64)
    member[weights.argsort(descending=True, stable=True)] = torch.arange(rows) * blocks // rows
    sizes = member.bincount(minlength=blocks)
    ranks = _ranks(torch.zeros(blocks).double().index_add_(0, member, weights) / sizes, sizes, columns, rank)
    if rounds:
        # Rotated, which preserves distances, and scaled so that no square overflows.
        table = factors.whitened(weight, None, evidence.columns)
        points = table.left * table.values.sqrt()
        member, ranks = _refined(points / points.abs().max().clamp_min(1e-30), weights, member, ranks, columns, rounds)
    return Grouping(member.to(torch.uint8), tuple(ranks.tolist()))


def _weights(evidence: Evidence) -> Tensor:
    """Positive row weights, float64."""
    require_finite(evidence.rows)
    weights = evidence.rows.double()
    return weights.clamp_min(float(weights.max()) * 1e-9).clamp_min(1e-30)


def _ranks(means: Tensor, sizes: Tensor, columns: int, rank: int) -> Tensor:
    """Ranks proportional to mean weights, from 1 to the rank at which a dense block is as small."""
    budget = rank * (int(sizes.sum()) + columns)

    def at(scale: float) -> tuple[Tensor, int]:
        ranks = (means * scale).clamp(1, columns).long()
        split = ranks * (sizes + columns) < sizes * columns
        count = torch.where(split, ranks * (sizes + columns), sizes * columns)
        return torch.where(split, ranks, columns), int(count.sum())

    least = at(0.0)[1]
    if least > budget:
        raise RequestError(
            f"groupreduce: rank 1 in each of {len(sizes)} blocks takes {least} coefficients, but rank {rank} allows "
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
    """Members and ranks of the non-empty blocks after moving rows until this no longer helps."""
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
    """The cost of every row in every block, (rows, blocks), with bases fitted to the current members."""
    energy, cost = points.square().sum(1), torch.zeros(len(points), len(ranks))
    for number, rank in enumerate(ranks):
        if rank < columns:
            here = member == number
            right = factors.whitened(points[here], weights[here], None, rank).right
            cost[:, number] = energy - (points @ functional.normalize(right, dim=1).t()).square().sum(1)
    return cost.clamp_min_(0) * weights[:, None]


def _dealt(cost: Tensor, ranks: Tensor, budget: int) -> Tensor:
    """The cheapest block of every row at the lowest coefficient price that meets the budget."""
    low, high = 0.0, float(cost.max())
    for _ in range(50):
        price = (low + high) / 2
        within = int(ranks[(cost + price * ranks).argmin(1)].sum()) <= budget
        low, high = (low, price) if within else (price, high)
    return (cost + high * ranks).argmin(1)
