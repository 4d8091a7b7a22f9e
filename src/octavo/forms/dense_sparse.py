"""Sparse combinations of the atoms of small dictionaries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.forms.base import Form, child, expect, expect_integers, form, nest

#: Largest number of inputs for which products with atoms are gathered; beyond it the dense product is cheaper.
_FEW = 4
#: From this many atoms per column of a block, rows are assembled atom by atom.
_MANY = 16
#: Coefficients, including zeros, held at once.
_AT_ONCE = 1 << 22


@form("dense-sparse")
@dataclass(frozen=True)
class DenseSparse(Form):
    """``weight = [S_1 D_1, S_2 D_2, ...]``: blocks of ``b`` columns, in each a dense dictionary ``D`` of ``m`` atoms.

    Every row uses exactly ``k`` atoms of each dictionary. The last block may be narrower. Atoms in rising order are
    stored as the gaps between them, which need fewer bits.

    Parameters
    ----------
    values
        Form of shape (rows, blocks * k): the coefficients.
    index
        (rows, blocks * k) integers below ``m``: the atom of each coefficient.
    dictionary
        Form of shape (blocks * m, b): the dictionaries, one below the other.
    nonzeros
        ``k``.
    columns
        Columns of the matrix, more than ``(blocks - 1) * b`` and at most ``blocks * b``.
    """

    values: Form
    index: Tensor
    dictionary: Form
    nonzeros: int
    columns: int

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        return (self.values.shape[0], self.columns)

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        # A copy, also of what is int64 already.
        gaps = self.index.to(torch.long, copy=True).unflatten(1, (-1, self.nonzeros))
        gaps[..., 1:] -= gaps[..., :-1] + 1
        rising = not gaps.numel() or int(gaps.min()) >= 0
        atoms = {"gaps": gaps.flatten(1).to(self.index.dtype)} if rising else {"index": self.index}
        return {**atoms, **nest(values=self.values, dictionary=self.dictionary)}

    def meta(self) -> dict[str, Any]:  # noqa: D102
        blocks = self.values.shape[1] // self.nonzeros
        atoms, width = self.dictionary.shape[0] // blocks, self.dictionary.shape[1]
        sizes = {"nonzeros": self.nonzeros, "atoms": atoms, "width": width, "columns": self.columns}
        return {"form": self.name, **sizes, "values": self.values.meta(), "dictionary": self.dictionary.meta()}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> DenseSparse:  # noqa: D102
        nonzeros, atoms, width = (int(meta[key]) for key in ("nonzeros", "atoms", "width"))
        expect(meta["columns"] == shape[1], f"{meta['columns']} columns do not fit a matrix of shape {shape}")
        expect(0 < width <= shape[1], f"blocks of {width} columns do not fit a matrix of shape {shape}")
        expect(0 < nonzeros <= atoms <= max(shape[0], width), f"{nonzeros} of {atoms} atoms do not fit shape {shape}")
        blocks = -(-shape[1] // width)
        expect(not {"gaps", "index"} <= set(tensors), "atoms are stored twice, as gaps and as an index")
        part = "gaps" if "gaps" in tensors else "index"
        index = expect_integers(tensors[part], (shape[0], blocks * nonzeros), part)
        if part == "gaps":
            expect(not index.numel() or 0 <= int(index.min()) <= int(index.max()) < atoms, "a gap is out of range")
            places = (index.long() + 1).unflatten(1, (blocks, nonzeros)).cumsum(2) - 1
            expect(not places.numel() or int(places.max()) < atoms, f"gaps point beyond {atoms} atoms")
            fits = not places.numel() or int(places.max()) <= torch.iinfo(index.dtype).max
            index = places.flatten(1).to(index.dtype if fits else torch.int32)
        expect(
            not index.numel() or 0 <= int(index.min()) <= int(index.max()) < atoms, f"an atom number exceeds {atoms}"
        )
        values = child(tensors, meta, "values", (shape[0], blocks * nonzeros))
        return cls(values, index, child(tensors, meta, "dictionary", (blocks * atoms, width)), nonzeros, shape[1])

    @classmethod
    def work(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> int:  # noqa: D102
        nonzeros, atoms, width = (int(meta[key]) for key in ("nonzeros", "atoms", "width"))
        blocks = -(-shape[1] // max(width, 1))
        entries, padded = shape[0] * blocks * nonzeros, shape[0] * blocks * width
        picked = max(min(entries * width, _AT_ONCE), blocks * nonzeros * width)
        spread = max(min(shape[0] * blocks * atoms, _AT_ONCE), blocks * atoms)
        # Places as 64-bit numbers, several times; some rows with their atoms; all rows, in parts and joined.
        return 48 * entries + 12 * max(picked, spread) + 8 * padded

    def dense(self) -> Tensor:  # noqa: D102
        return self._combined(self.values.dense(), self.index)

    def lookup(self, index: Tensor) -> Tensor:  # noqa: D102
        return self._combined(self.values.lookup(index), self.index[index])

    def apply(self, x: Tensor) -> Tensor:  # noqa: D102
        if x.numel() > _FEW * self.columns:
            return super().apply(x)
        dictionary = self._atoms().to(x.dtype)
        blocks, _, width = dictionary.shape
        padded = torch.nn.functional.pad(x, (0, blocks * width - self.columns)).unflatten(-1, (blocks, width))
        # Products of the input with every atom are taken once; rows only pick and add.
        products = torch.einsum("...bw,bmw->...bm", padded, dictionary).flatten(-2)
        return (products[..., self._flat(self.index)] * self.values.dense().to(x.dtype)).sum(-1)

    def _atoms(self) -> Tensor:
        """The dictionaries as (blocks, m, b)."""
        return self.dictionary.dense().unflatten(0, (self.values.shape[1] // self.nonzeros, -1))

    def _flat(self, index: Tensor) -> Tensor:
        """Atoms numbered across all blocks, (rows, blocks * k)."""
        blocks = self.values.shape[1] // self.nonzeros
        starts = torch.arange(blocks).repeat_interleave(self.nonzeros) * (self.dictionary.shape[0] // blocks)
        return index.long() + starts.to(index.device)

    def _combined(self, values: Tensor, index: Tensor) -> Tensor:
        dictionary = self._atoms()
        blocks, atoms, width = dictionary.shape
        if atoms > _MANY * width:
            # Products with so many zeros would take far longer than the atoms that are used.
            every, parts = dictionary.flatten(0, 1), []
            height = max(1, _AT_ONCE // (index.shape[1] * width))
            for some, places in zip(values.split(height), self._flat(index).split(height), strict=True):
                picked = every[places] * some[..., None]
                parts.append(picked.unflatten(1, (blocks, self.nonzeros)).sum(2).flatten(1))
            return torch.cat(parts)[:, : self.columns]
        # A few rows at a time: with their zeros they may be many times as large as the matrix.
        height, parts = max(1, _AT_ONCE // (blocks * atoms)), []
        for some, places in zip(values.split(height), self._flat(index).split(height), strict=True):
            sparse = some.new_zeros(len(some), blocks * atoms).scatter_add(1, places, some)
            parts.append(torch.einsum("rbm,bmw->rbw", sparse.unflatten(1, (blocks, atoms)), dictionary).flatten(1))
        return torch.cat(parts)[:, : self.columns]
