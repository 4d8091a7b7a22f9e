"""Tables that train the dense parts of a form, and the forms that share rows, factors or widths."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from octavo.errors import RequestError
from octavo.forms import Dense, Form, Hash, Hashed, LowRank, RowBlocks, TensorTrain, with_leaves
from octavo.forms.hashed import PRIME
from octavo.forms.leaves import on_device
from octavo.forms.rowblocks import MOST_BLOCKS
from octavo.methods.factorize.mpo import modes
from octavo.training.adaptive_trains import random_train
from octavo.training.formed import Leaf, without_leaves
from octavo.training.tables.base import CompactTable

#: Standard deviation of the elements of new tables.
DEVIATION = 0.05


class FormTable(CompactTable):
    """A table that trains the dense leaves of any form, and reads rows by the form's own lookup.

    Parameters
    ----------
    form
        Where it starts. What is not a :class:`octavo.forms.Dense` leaf, such as masks and hashes, is fixed.
    """

    def __init__(self, form: Form) -> None:
        super().__init__(*form.shape)
        self._fixed, self.leaves = without_leaves(form), nn.ParameterList()
        self._device: torch.device | None = None
        with_leaves(form, self._opened)
        if not len(self.leaves):
            raise RequestError(f"table: the form {form.name!r} has no dense part to train; give one that has")

    def read(self, index: Tensor) -> Tensor:  # noqa: D102
        # The table may have been moved since the last time.
        if self.leaves[0].device != self._device:
            self._device = self.leaves[0].device
            self._fixed = on_device(self._fixed, self._device)
        coming = iter(self.leaves)
        return _with(self._fixed, lambda: Leaf(next(coming))).lookup(index)

    def form(self) -> Form:  # noqa: D102
        coming = iter(self.leaves)
        fixed = on_device(self._fixed, torch.device("cpu"))
        return _with(fixed, lambda: Dense(next(coming).detach().cpu().clone()))

    def _opened(self, leaf: Form) -> Form:
        if isinstance(leaf, Dense):
            self.leaves.append(nn.Parameter(leaf.weight.detach().float().clone()))
        return leaf


def _with(form: Form, leaf: Callable[[], Form]) -> Form:
    """A form with other dense leaves, in the order of discovery."""
    return with_leaves(form, lambda old: leaf() if isinstance(old, Dense) else old)


def random_dense(rows: int, columns: int, deviation: float = DEVIATION) -> Dense:
    """Gaussian elements."""
    return Dense(torch.randn(rows, columns) * deviation)


def hashed_rows(rows: int, columns: int, size: int, *, functions: int = 0, seed: int = 0) -> Hashed:
    """All rows share ``size`` ones, by number modulo ``size``; or each is the sum of ``functions`` random ones.

    Two functions are double hashing: few rows agree in both.

    Raises
    ------
    RequestError
        If ``size`` is not from 1 to the number of rows.
    """
    _fits(size, rows, "rows")
    hashes = tuple(_random(size, seed + k) for k in range(functions)) or (Hash(size),)
    return Hashed(random_dense(size, columns, DEVIATION / len(hashes) ** 0.5), hashes, rows, columns)


def quotient_remainder(rows: int, columns: int, size: int) -> Hashed:
    """Row ``i`` is the product of row ``i % size`` of one table and row ``i // size`` of another, so no two agree.

    Source: Shi et al. (2020), arXiv 1909.02107.
    """
    _fits(size, rows, "rows")
    others = -(-rows // size)
    hashes = (Hash(size), Hash(others, size, divisor=size))
    # A product of two Gaussians has the deviation of both, multiplied.
    return Hashed(random_dense(size + others, columns, DEVIATION**0.5), hashes, rows, columns, product=True)


def hashed_elements(rows: int, columns: int, size: int, *, width: int = 1, seed: int = 0) -> Hashed:
    """Every piece of ``width`` elements, with a random sign, is one of ``size`` that all rows share (ROBE).

    Source: Desai et al. (2022), arXiv 2108.02191; there, pieces may also begin between the places of others.
    """
    _fits(size, rows * -(-columns // width), "pieces")
    hashes = (_random(size, seed, signed=1),)
    return Hashed(random_dense(size, width), hashes, rows, columns)


def frequent_rows(counts: Tensor, columns: int, own: int, size: int) -> RowBlocks:
    """The ``own`` most frequent rows stand for themselves, and the others share ``size`` (AdaptEmb).

    Parameters
    ----------
    counts
        (rows,) how often each row is used.

    Raises
    ------
    RequestError
        If no rows are left for either part.
    """
    rest = len(counts) - own
    if not 0 < own < len(counts):
        raise RequestError(f"frequent rows: {own} of {len(counts)} rows are their own; give 1 to {len(counts) - 1}")
    return RowBlocks(ranked(counts, [own]), (random_dense(own, columns), hashed_rows(rest, columns, size)))


def ranked(counts: Tensor, ends: Sequence[int]) -> Tensor:
    """Blocks of rows (rows,) uint8 by frequency: block 0 holds the ``ends[0]`` most frequent, and so on.

    They are on the CPU, where tables are made.

    Raises
    ------
    RequestError
        If there are more blocks than a byte can number.
    """
    if len(ends) >= MOST_BLOCKS:
        raise RequestError(
            f"blocks of rows: {len(ends) + 1} blocks, but the number of a block is one byte; give at most {MOST_BLOCKS}"
        )
    counts, place = counts.cpu(), torch.empty(len(counts), dtype=torch.long)
    place[counts.argsort(descending=True, stable=True)] = torch.arange(len(counts))
    return torch.bucketize(place, torch.tensor(ends), right=True).to(torch.uint8)


def thin_rows(rows: int, columns: int, width: int) -> LowRank:
    """Rows of ``width`` elements, and a projection to all columns."""
    _fits(width, columns, "columns")
    return LowRank(random_dense(rows, width), Dense(torch.randn(width, columns) / width**0.5))


def widths_by_frequency(rows: Sequence[int], power: float, most: int, scale: float = 1.0) -> list[int]:
    """Widths of tables that fall with their rows, as ``scale * most * (rows / fewest) ** -power`` (MDE).

    They are rounded to powers of two, from 1 to ``most``: rows of large tables are used more rarely.

    Source: Ginart et al. (2021), arXiv 1909.11810.
    """
    fewest = min(rows)
    wanted = [scale * most * (count / fewest) ** -power for count in rows]
    return [min(most, 2 ** round(math.log2(max(1.0, width)))) for width in wanted]


def train_of_rows(rows: int, columns: int, rank: int, cores: int = 3) -> TensorTrain:
    """A tensor train over the digits of row and column numbers (TT-Rec).

    Source: Yin et al. (2021), arXiv 2101.11714.
    """
    split = modes(rows, cores), modes(columns, cores)
    return random_train((rows, columns), *split, rank, DEVIATION)


def _random(size: int, seed: int, signed: int = 0) -> Hash:
    draws = torch.Generator().manual_seed(seed)
    factor, shift = (int(torch.randint(1, PRIME, (), generator=draws)) for _ in range(2))
    return Hash(size, 0, 1, factor, shift, signed)


def _fits(size: int, most: int, of: str) -> None:
    if not 1 <= size <= most:
        raise RequestError(f"table: {size} shared of {most} {of}; give a number from 1 to {most}")
