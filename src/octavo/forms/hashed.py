"""Pieces of rows that hash functions take from a smaller table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.forms.base import Form, apply_by_rows, child, elements, expect, form, nest

#: Hashed numbers are taken modulo this prime, so that no product exceeds 63 bits.
PRIME = 2**31 - 1
#: No table needs more hash functions than this.
MOST_HASHES = 16


@dataclass(frozen=True)
class Hash:
    """A piece's place in the table: ``start + h % size`` with ``h = (factor * (number // divisor) + shift) % PRIME``.

    With the factor 1 it is the remainder or, with ``size`` as divisor of another one, the quotient of the number.

    Parameters
    ----------
    size
        Rows of the table that it may take.
    start
        The first of them.
    divisor, factor, shift
        Of the number of the piece; the factor is from 1 and the shift from 0, both below :data:`PRIME`.
    signed
        1 if a piece is multiplied by ``1 - 2 * (h // size % 2)``, a sign that looks random; else 0.
    """

    size: int
    start: int = 0
    divisor: int = 1
    factor: int = 1
    shift: int = 0
    signed: int = 0

    def places(self, number: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows of the table for the numbers of pieces, and their signs in float32 if there are any."""
        hashed = (torch.div(number, self.divisor, rounding_mode="floor") * self.factor + self.shift) % PRIME
        sign = 1.0 - 2.0 * (torch.div(hashed, self.size, rounding_mode="floor") % 2) if self.signed else None
        return hashed.remainder_(self.size).add_(self.start) if sign is None else hashed % self.size + self.start, sign


@form("hashed")
@dataclass(frozen=True)
class Hashed(Form):
    """``piece[k] = sum_t sign_t[k] * table[hash_t(k)]``; a row is some pieces, which are numbered through all rows.

    Pieces are as wide as the table. The last piece of a row may be cut. Places are computed, so they take no bytes.

    Parameters
    ----------
    table
        Form of shape (size, width).
    hashes
        One or more; the pieces that they take are added.
    rows, columns
        Of the matrix.
    product
        Whether pieces are multiplied element by element instead of added.
    """

    table: Form
    hashes: tuple[Hash, ...]
    rows: int
    columns: int
    product: bool = False

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        return (self.rows, self.columns)

    @property
    def pieces(self) -> int:
        """Pieces of a row."""
        return -(-self.columns // self.table.shape[1])

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        return nest(table=self.table)

    def meta(self) -> dict[str, Any]:  # noqa: D102
        sizes = {"shape": list(self.shape), "table_shape": list(self.table.shape), "product": self.product}
        hashes = [list(astuple(one)) for one in self.hashes]
        return {"form": self.name, **sizes, "hashes": hashes, "table": self.table.meta()}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> Hashed:  # noqa: D102
        expect(meta["shape"] == list(shape), f"hashed rows of shape {meta['shape']} do not fit a matrix of {shape}")
        size, width = (int(n) for n in meta["table_shape"])
        expect(0 < width <= max(shape[1], 1), f"pieces of {width} columns do not fit a matrix of shape {shape}")
        pieces = shape[0] * -(-shape[1] // width)
        expect(pieces < PRIME, f"{pieces} pieces are more than can be hashed")
        hashes = tuple(Hash(*(int(n) for n in numbers)) for numbers in meta["hashes"])
        expect(0 < len(hashes) <= MOST_HASHES, f"{len(hashes)} hash functions; expected 1 to {MOST_HASHES}")
        expect(
            0 < size <= max(1, pieces) * len(hashes), f"a table of {size} rows is larger than the {pieces} pieces need"
        )
        for one in hashes:
            expect(
                0 < one.size <= size and 0 <= one.start <= size - one.size,
                f"a hash function takes rows {one.start}..{one.start + one.size - 1} of a table of {size}",
            )
            expect(
                0 < one.divisor < PRIME and 0 < one.factor < PRIME and 0 <= one.shift < PRIME and one.signed in (0, 1),
                f"a number of the hash function {astuple(one)} is out of range",
            )
        table = child(tensors, meta, "table", (size, width))
        return cls(table, hashes, *shape, bool(meta["product"]))

    @classmethod
    def work(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> int:  # noqa: D102
        size, width = (int(n) for n in meta["table_shape"])
        pieces = shape[0] * -(-shape[1] // max(width, 1))
        # Numbers, hashes and places as 64-bit integers, with signs; pieces of two functions, and the total.
        return 4 * size * width + 48 * pieces + 16 * pieces * width + 4 * elements(shape)

    def grown(self, share: float, stored: Callable[[Form], int]) -> int:  # noqa: D102
        # More rows share the same table.
        return stored(self)

    def dense(self) -> Tensor:  # noqa: D102
        table = self.table.dense()
        return self._combined(torch.arange(self.rows, device=table.device), lambda places: table[places])

    def lookup(self, index: Tensor) -> Tensor:
        """Rows of the matrix (n, columns) for ``index`` (n,), from a few rows of the table.

        Raises
        ------
        IndexError
            If a number is below 0 or not below the rows: a hash would give it a row of another.
        """
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.rows:
            raise IndexError(f"index {int(index.min())}..{int(index.max())} is out of range for {self.rows} rows")
        return self._combined(index.long(), self.table.lookup)

    def apply(self, x: Tensor) -> Tensor:  # noqa: D102
        return apply_by_rows(self, x)

    def _combined(self, index: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor:
        pieces = self.pieces
        number = (index[:, None] * pieces + torch.arange(pieces, device=index.device)).flatten()
        whole = None
        for one in self.hashes:
            places, sign = one.places(number)
            found = read(places)
            if sign is not None:
                found = found * sign[:, None]
            whole = found if whole is None else whole * found if self.product else whole + found
        assert whole is not None
        return whole.reshape(len(index), pieces * self.table.shape[1])[:, : self.columns].contiguous()
