"""Chains of small cores: tensor trains, called matrix product operators in physics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.forms.base import Form, child, elements, expect, form, nest

#: No layer needs more cores than this.
MOST_CORES = 16
#: Elements between two cores held at once: 16 MB.
_AT_ONCE = 1 << 22
#: From this share of all rows, multiplying the cores out is cheaper than looking rows up.
_SHARE = 1 / 32


@form("tensor-train")
@dataclass(frozen=True)
class TensorTrain(Form):
    """``weight[(o_1 .. o_N), (i_1 .. i_N)] = G_1[o_1, i_1] G_2[o_2, i_2] ... G_N[o_N, i_N]``.

    Rows and columns are written in mixed radix; each core ``G_k[o, i]`` is a matrix of ``chi_(k-1) x chi_k``, and
    ``chi_0 = chi_N = 1``. If the row modes of the first cores and the column modes of the last are 1, this is a train
    over inputs, then outputs. Tensorized layers trained from scratch have that form.

    Parameters
    ----------
    cores
        Forms of shape (chi_(k-1) * o_k * i_k, chi_k).
    row_modes, column_modes
        ``o_k`` and ``i_k``. Their products may exceed rows and columns; the excess is cut off.
    rows, columns
        Of the matrix.
    """

    factored = True

    cores: tuple[Form, ...]
    row_modes: tuple[int, ...]
    column_modes: tuple[int, ...]
    rows: int
    columns: int

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        return (self.rows, self.columns)

    @property
    def ranks(self) -> tuple[int, ...]:
        """``chi_0`` to ``chi_N``."""
        return (1, *(core.shape[1] for core in self.cores))

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        return nest(**self._named())

    def meta(self) -> dict[str, Any]:  # noqa: D102
        modes = {"rows": list(self.row_modes), "columns": list(self.column_modes), "ranks": list(self.ranks)}
        modes["shape"] = list(self.shape)
        return {"form": self.name, **modes, **{name: core.meta() for name, core in self._named().items()}}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> TensorTrain:  # noqa: D102
        rows, columns, ranks = ([int(n) for n in meta[key]] for key in ("rows", "columns", "ranks"))
        expect(
            meta["shape"] == list(shape), f"a tensor train of shape {meta['shape']} does not fit a matrix of {shape}"
        )
        check_modes(rows, shape[0], "row")
        check_modes(columns, shape[1], "column")
        expect(len(rows) == len(columns) == len(ranks) - 1 <= MOST_CORES, "the numbers of modes and ranks do not match")
        expect(min(ranks) > 0 and ranks[0] == ranks[-1] == 1, f"ranks {ranks} must begin and end with 1")
        full = full_ranks(rows, columns)
        expect(all(rank <= most for rank, most in zip(ranks, full, strict=True)), f"ranks {ranks} exceed {full}")
        cores = [
            child(tensors, meta, f"core{k}", (ranks[k] * rows[k] * columns[k], ranks[k + 1])) for k in range(len(rows))
        ]
        return cls(tuple(cores), tuple(rows), tuple(columns), *shape)

    @classmethod
    def work(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> int:  # noqa: D102
        rows, columns, ranks = ([int(n) for n in meta[key]] for key in ("rows", "columns", "ranks"))
        expect(len(rows) == len(columns) == len(ranks) - 1 <= MOST_CORES, "the numbers of modes and ranks do not match")
        steps = [a * r * c * b for a, r, c, b in zip(ranks, rows, columns, ranks[1:], strict=False)]
        wholes = [math.prod(rows[:k]) * math.prod(columns[:k]) * ranks[k] for k in range(len(ranks))]
        # Every product and its factors are written in one order and copied to another.
        return max(4 * (2 * wholes[k] + 2 * core + 2 * wholes[k + 1]) for k, core in enumerate(steps)) + 4 * elements(
            shape
        )

    def dense(self) -> Tensor:  # noqa: D102
        whole = self._core(0).new_ones(1, 1, 1)
        for k in range(len(self.cores)):
            whole = torch.einsum("RCa,aoib->RoCib", whole, self._core(k)).flatten(0, 1).flatten(1, 2)
        return whole[: self.rows, : self.columns, 0].contiguous()

    def lookup(self, index: Tensor) -> Tensor:  # noqa: D102
        rows, places = index.long().unique(return_inverse=True)
        if len(rows) > _SHARE * self.rows:
            return self.dense()[index]
        cores, ranks = [self._core(k) for k in range(len(self.cores))], self.ranks
        widths = [math.prod(self.column_modes[:k]) for k in range(len(cores) + 1)]
        each = max(ranks[k + 1] * max(ranks[k] * mode, widths[k + 1]) for k, mode in enumerate(self.column_modes))
        parts = [self._rows(cores, some) for some in rows.split(max(1, _AT_ONCE // each))]
        return torch.cat(parts)[places]

    def apply(self, x: Tensor) -> Tensor:  # noqa: D102
        flat = x.reshape(-1, self.columns)
        work, whole, largest = self._costs()
        if len(flat) * work > whole + len(flat) * self.rows * self.columns or largest > _AT_ONCE:
            return x @ self.dense().to(x.dtype).t()
        cores = [self._core(k).to(x.dtype) for k in range(len(self.cores))]
        parts = [self._chained(cores, some) for some in flat.split(max(1, _AT_ONCE // largest))]
        return torch.cat(parts).reshape(*x.shape[:-1], self.rows)

    def _chained(self, cores: Sequence[Tensor], x: Tensor) -> Tensor:
        """The product with every row of ``x`` (n, columns), core by core."""
        width = math.prod(self.column_modes)
        # Batch, outputs so far, chi, inputs to come.
        state = torch.nn.functional.pad(x, (0, width - self.columns)).reshape(len(x), 1, 1, width)
        for core in cores:
            state = torch.einsum("zRaic,aoib->zRobc", state.unflatten(3, (core.shape[2], -1)), core).flatten(1, 2)
        return state[:, : self.rows, 0, 0]

    def _rows(self, cores: Sequence[Tensor], index: Tensor) -> Tensor:
        """Rows of the matrix, (n, columns)."""
        digits, rest = [], index
        for mode in reversed(self.row_modes):
            digits.append(rest % mode)
            rest = rest // mode
        found = cores[0].new_ones(len(index), 1, 1)
        for core, digit in zip(cores, reversed(digits), strict=True):
            # (chi, o, i, chi') at each row's own o: a batch of small products.
            slices = core[:, digit].transpose(0, 1).flatten(2)
            found = (found @ slices).unflatten(2, (core.shape[2], -1)).flatten(1, 2)
        return found[:, : self.columns, 0]

    def _costs(self) -> tuple[int, int, int]:
        """Multiplications of one input core by core, those of multiplying out, and most elements held for an input."""
        work, whole, largest = 0, 0, math.prod(self.column_modes)
        outputs, inputs, ranks = 1, math.prod(self.column_modes), self.ranks
        for k, (o, i) in enumerate(zip(self.row_modes, self.column_modes, strict=True)):
            done = math.prod(self.column_modes[: k + 1])
            work += outputs * o * inputs * ranks[k] * ranks[k + 1]
            outputs, inputs = outputs * o, inputs // i
            whole += outputs * done * ranks[k] * ranks[k + 1]
            largest = max(largest, outputs * inputs * ranks[k + 1])
        return work, whole, largest

    def _core(self, k: int) -> Tensor:
        """Core ``k`` as (chi_(k-1), o_k, i_k, chi_k)."""
        return self.cores[k].dense().reshape(-1, self.row_modes[k], self.column_modes[k], self.cores[k].shape[1])

    def _named(self) -> dict[str, Form]:
        return {f"core{k}": core for k, core in enumerate(self.cores)}


def check_modes(modes: Sequence[int], size: int, what: str) -> None:
    """Raise :class:`ArtifactError` unless the product of ``modes`` is ``size`` or slightly more."""
    product = math.prod(modes)
    expect(
        0 < len(modes) <= MOST_CORES and min(modes) > 0 and size <= product < 2 * size + 2,
        f"{what} modes {list(modes)} multiply to {product}; expected {size} to twice that",
    )


def full_ranks(row_modes: Sequence[int], column_modes: Sequence[int]) -> list[int]:
    """The ranks ``chi_0 .. chi_N`` of an exact decomposition."""
    sizes = [o * i for o, i in zip(row_modes, column_modes, strict=True)]
    return [min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(len(sizes) + 1)]
