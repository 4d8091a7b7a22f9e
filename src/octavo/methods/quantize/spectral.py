"""What methods of the frequency domain share: the blocks of a matrix, and what an error costs in that domain."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor

from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.forms.frequency import LONGEST_SIDE, BlockShape, to_frequency
from octavo.methods.base import Method
from octavo.sources.sites import Site


@dataclass(frozen=True)
class Spectral(Method):
    """A method that encodes coefficients of a cosine transform (:class:`octavo.forms.Frequency`).

    Parameters
    ----------
    block
        Rows, height and width of a block. By default the kernels of convolutions, and tiles of other matrices.
    """

    #: The largest tile of a matrix that is no convolution's, as rows and columns.
    tile: ClassVar[tuple[int, int]]

    block: BlockShape | None = None

    def accepts(self, site: Site) -> bool:
        """Weights with neighbours: not the single rows of values, which have no order."""
        return site.kind != "vector"

    def at_site(self, site: Site) -> Self:
        """For a convolution the block is its kernel."""
        kernel = site.shape[2:][-2:] if site.kind == "convolution" else ()
        if self.block is not None or math.prod(kernel) == 1 or max(kernel) > LONGEST_SIDE:
            return self
        height, width = (1, *kernel)[-2:]
        return replace(self, block=(1, height, width))

    def blocks(self, weight: Tensor) -> BlockShape:
        """The block of a matrix, which divides it.

        Raises
        ------
        RequestError
            If the blocks that were asked for do not divide it.
        """
        rows, columns = weight.shape
        if self.block is None:
            return (_divisor(rows, self.tile[0]), 1, _divisor(columns, self.tile[1]))
        sides = tuple(self.block)
        if not (len(sides) == 3 and all(isinstance(side, int) and 0 < side <= LONGEST_SIDE for side in sides)):
            raise RequestError(f"{self.name}: block is {sides}; give rows, height and width from 1 to {LONGEST_SIDE}")
        if rows % sides[0] or columns % (sides[1] * sides[2]):
            raise RequestError(
                f"{self.name}: blocks of {sides} do not divide a matrix of {rows} x {columns}; choose sides that do"
            )
        return sides

    def moved(self, weight: Tensor, evidence: Evidence) -> tuple[Tensor, Evidence, BlockShape]:
        """Coefficients, the cost of their errors, and the block.

        With ``W = coefficients T`` the moment of columns is ``T C T^T``. Rows of one tile share its mean weight.
        """
        block = self.blocks(weight)
        rows, height, width = block
        across = (1, height, width)
        key = f"frequency {across}"
        if key not in evidence.cache:
            moment = evidence.columns
            if moment is not None:
                moment = to_frequency(to_frequency(moment, across).t().contiguous(), across)
                moment = (moment + moment.t()) / 2
            # Layers with one input, and samples of their rows, share what depends on the moment alone.
            evidence.cache[key] = moment, {}
        moment, cache = evidence.cache[key]
        weights = evidence.rows.view(-1, rows).mean(1).repeat_interleave(rows)
        return to_frequency(weight.float(), block), Evidence(weights, moment, evidence.samples, cache), block


def _divisor(size: int, most: int) -> int:
    """The largest divisor up to ``most``."""
    return next(side for side in range(min(size, most), 0, -1) if size % side == 0)
