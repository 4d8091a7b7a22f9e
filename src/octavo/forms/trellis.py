"""Integer codes on a grid; the preceding codes choose which of two quantizers reads each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from octavo.coding import ParityContext
from octavo.errors import ArtifactError
from octavo.forms.base import Form, child, elements, expect, form, nest
from octavo.forms.grid import Grid

#: Rows of one column are distributed to this many trellises in turn, so that an encoder advances all of them at once.
LANES = 4
#: Ungerboeck's code of 16 states, ``h0 = 1 + D + D^4`` and ``h1 = D^2``: the delays at which earlier quantizers and
#: parities determine the next quantizer.
QUANTIZER_TAPS = (1, 4)
PARITY_TAPS = (2,)
#: Which quantizer reads each code of a matrix: the bits of this context.
QUANTIZERS = ParityContext(LANES, QUANTIZER_TAPS, PARITY_TAPS)


@form("trellis")
@dataclass(frozen=True)
class Trellis(Form):
    """A grid with the codes ``2 * codes + quantizer``, where ``quantizer`` (0 or 1) is not stored.

    With ``p = codes & 1``, and zeros before the first row,

        quantizer[i, j] = quantizer[i - 4, j] ^ quantizer[i - 16, j] ^ p[i - 8, j]

    Addition without carry makes this linear, so all rows are computed together. Codes of both quantizers have tables of
    their own where that saves bytes (:mod:`octavo.coding.parities`).

    Parameters
    ----------
    grid
        The codes and their steps, without zero points.
    """

    grid: Grid

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        return self.grid.shape

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        return nest(grid=self.grid)

    def meta(self) -> dict[str, Any]:  # noqa: D102
        return {"form": self.name, "grid": self.grid.meta()}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> Trellis:  # noqa: D102
        grid = child(tensors, meta, "grid", shape)
        if not isinstance(grid, Grid):
            raise ArtifactError(f"a trellis needs a grid, not a form {grid.name!r}")
        expect(grid.zero is None, "the grid of a trellis has zero points")
        return cls(grid)

    @classmethod
    def work(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> int:  # noqa: D102
        # The levels (two or eight bytes each) and the bits of the quantizers.
        return elements(shape) * (6 if tensors["grid/codes"].dtype == torch.int8 else 20)

    def contexts(self) -> list[tuple[Tensor, ParityContext]]:  # noqa: D102
        return [(self.grid.codes, QUANTIZERS)]

    def dense(self) -> Tensor:  # noqa: D102
        return self.levels().dense()

    def levels(self) -> Grid:
        """The grid of all levels, with the quantizers in its codes."""
        codes = self.grid.codes
        narrow = codes.cpu().numpy()
        # One bit more than the codes have.
        levels: np.ndarray[Any, np.dtype[np.integer[Any]]] = narrow.astype(
            np.int16 if narrow.dtype == np.int8 else np.int64
        )
        levels <<= 1
        levels |= QUANTIZERS.bits(narrow)
        return replace(self.grid, codes=torch.from_numpy(levels).to(codes.device))
