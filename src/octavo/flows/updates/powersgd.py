"""PowerSGD: low rank by subspace iteration, its factors quantized and entropy-coded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from octavo.errors import RequestError
from octavo.flows.base import flow
from octavo.flows.schema import Schema
from octavo.flows.updates.base import UpdateCodec
from octavo.flows.updates.codes import expect, pack_scaled, unpack_scaled
from octavo.flows.updates.rounding import FINE

#: Doublings of the step below the largest entry.
_DOUBLINGS = 14
_MOST = 1 << _DOUBLINGS
#: Ranks that a payload can state, in its last part of one byte.
_HIGHEST = 255


@dataclass(frozen=True)
class _Factors:
    """Factors of all matrices of a rank, in a row; a block is the pair of columns of a component, or a whole vector.

    Parameters
    ----------
    values, weights
        Entries, float32, and how much the error of a block's entry counts, (blocks,) float64.
    """

    rank: int
    values: Tensor
    weights: Tensor


@flow("powersgd", source="PowerSGD (Vogels et al., 2019, arXiv 1905.13727)")
@dataclass(frozen=True)
class PowerSGD(UpdateCodec):
    """Every matrix as ``P Q^T`` of a rank; other tensors as they are. All are on a grid.

    ``P`` has orthonormal columns, from subspace iteration with a random start, and ``Q = M^T P``. With ``s`` the norm
    of a column of ``Q``, that component is sent as ``P sqrt(s)`` and ``Q / sqrt(s)``, with a step in proportion to
    ``1 / sqrt(s)``: errors then count alike. The amount sets the step. Components that are smaller than it vanish, so
    that the rank of each matrix is at most that of the plan. The source sends floats. The codec is biased: what lies
    outside the subspace is lost without feedback.

    Parameters
    ----------
    ranks
        Ranks of which a fit takes the best. Matrices of no higher rank are sent as they are.
    rounds
        Rounds of subspace iteration.
    """

    parts: ClassVar[int] = 4
    doubling: ClassVar[int | None] = FINE

    ranks: tuple[int, ...] = (1, 4, 16)
    rounds: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "ranks", tuple(self.ranks))  # a plan from JSON brings a list
        if not self.ranks or any(type(rank) is not int or not 1 <= rank <= _HIGHEST for rank in self.ranks):
            raise RequestError(f"powersgd: ranks is {self.ranks!r}; give whole numbers from 1 to {_HIGHEST}")
        if type(self.rounds) is not int or self.rounds < 1:
            raise RequestError(f"powersgd: rounds is {self.rounds!r}; give at least 1")

    def choices(self) -> list[dict[str, Any]]:
        """Every rank."""
        return [{"rank": rank} for rank in self.ranks]

    def most(self, schema: Schema) -> int:
        """The smallest step."""
        return FINE * (_DOUBLINGS + 1)

    def prepare(self, flat: Tensor, schema: Schema, choice: Mapping[str, Any], step: int) -> _Factors:
        """The factors."""
        generator = torch.Generator().manual_seed(step)
        values, weights = list[Tensor](), list[Tensor]()
        for part, (rows, columns, rank) in zip(
            flat.split(schema.sizes), _matrices(schema, choice["rank"]), strict=True
        ):
            if rank:
                start = torch.randn(columns, rank, generator=generator)
                pairs, sizes = _factored(part.view(rows, columns), start, self.rounds)
                values.append(pairs.flatten())
                weights.append(sizes.sqrt())
            else:
                values.append(part)
                weights.append(torch.ones(1, dtype=torch.float64))
        return _Factors(choice["rank"], torch.cat(values), torch.cat(weights))

    def pack(self, prepared: _Factors, schema: Schema, amount: int, choice: Mapping[str, Any]) -> Sequence[bytes]:
        """Gaps, codes, steps, and the rank."""
        sizes = _blocks(schema, prepared.rank)
        spread = prepared.weights.repeat_interleave(torch.tensor(sizes))
        top = float((prepared.values * spread).abs().max()) if len(spread) else 0.0
        # With amount 0 the step is twice the largest entry, and nothing is sent.
        share = top * 2.0 ** (1 - amount / FINE)
        codes = (prepared.values * spread / (share or 1.0)).round()
        places = codes.nonzero()[:, 0]
        steps = share / prepared.weights.clamp_min(1e-300)
        return *pack_scaled(places, codes[places], steps, sizes, _MOST), bytes([prepared.rank])

    def unpack(self, parts: Sequence[memoryview], schema: Schema, step: int) -> Tensor:
        """Products of the factors."""
        expect(len(parts[3]) == 1 and parts[3][0] in self.ranks, "its rank is not one of the plan")
        rank = parts[3][0]
        values = unpack_scaled(parts, _blocks(schema, rank), _MOST)
        found, start = list[Tensor](), 0
        for size, (rows, columns, kept) in zip(schema.sizes, _matrices(schema, rank), strict=True):
            length = (rows + columns) * kept if kept else size
            part, start = values[start : start + length], start + length
            if kept:
                pairs = part.view(kept, rows + columns)
                part = (pairs[:, :rows].T @ pairs[:, rows:]).flatten()
            found.append(part)
        # Products may leave float32; the schema clamps them.
        return torch.cat(found).nan_to_num()


def _matrices(schema: Schema, rank: int) -> list[tuple[int, int, int]]:
    """Rows and columns of every tensor, and its rank; 0 where factors would be no smaller."""
    found = []
    for shape, size in zip(schema.shapes, schema.sizes, strict=True):
        rows = shape[0] if len(shape) > 1 and size else 1
        columns = size // rows
        found.append((rows, columns, rank if rank * (rows + columns) < size else 0))
    return found


def _blocks(schema: Schema, rank: int) -> list[int]:
    """Entries of every block."""
    sizes = list[int]()
    for size, (rows, columns, kept) in zip(schema.sizes, _matrices(schema, rank), strict=True):
        sizes += [rows + columns] * kept if kept else [size]
    return sizes


def _factored(matrix: Tensor, start: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Pairs of columns of equal norm, (rank, rows + columns), and the sizes of the components, (rank,) float64."""
    # In units of the largest entry, so that squares neither overflow nor vanish.
    unit = matrix.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    scaled, right = matrix / unit, start
    for _ in range(rounds):
        left = torch.linalg.qr(scaled @ right).Q
        right = scaled.T @ left
    # The components of the subspace itself: the largest first, none in the way of another.
    turn, sizes, along = torch.linalg.svd(right.T, full_matrices=False)
    # A size may leave float32 where the entries are at its edge; its root does not.
    sizes = sizes.double() * unit.double()
    root = sizes.sqrt().float()
    return torch.cat([(left @ turn).T * root[:, None], along * root[:, None]], 1), sizes
