"""Trellis-coded quantization: two interleaved quantizers in turn, error feedback, adaptive entropy coding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from octavo.calibration.evidence import Evidence
from octavo.forms import Form, Trellis
from octavo.forms.trellis import LANES
from octavo.methods.base import Setting, method
from octavo.methods.feedback import round_blocks, round_columns
from octavo.methods.knobs import real
from octavo.methods.quantize import viterbi
from octavo.methods.quantize.units import Magnitudes, Stepped, StepUnits
from octavo.sources.sites import Site

#: Codes from -32 to 31 have individual lengths; further out the length hardly changes.
_CODES = 64
#: Weights in a chunk of rows: a search runs per column, and a call costs as much as a few hundred weights.
_CHUNK = 1 << 21
#: Rarer codes are assumed to have this length in bits.
_LONGEST = 24
#: The steps, in deviations of the weights, between which the price of a bit rises to twice the rate. At few bits zeros
#: are made by that price at less loss than by still larger steps.
_COARSE = (1.3, 1.9)
#: The step, in the same unit, from which the coder splits codes by their quantizer.
_SPLIT = 0.55


@method(
    "trellis",
    family="quantize",
    preset="default",
    source="Entropy-coded TCQ (Fischer & Wang, 1992) with Ungerboeck's 16 states and the error feedback of GPTQ",
)
@dataclass(frozen=True)
class TrellisCoded(Stepped):
    """Entropy-constrained quantization on levels twice as dense as its codes: 1 dB less error in the same bits.

    The levels ``0, ±1, ±2 …`` are half a step apart: the even ones form one quantizer and the odd ones another. The
    parities of the codes above a code in its column determine which quantizer reads it (:class:`octavo.forms.Trellis`).
    So a code takes the bits of a whole step. A choice of codes is a path through a graph of 16 states; the path of
    least ``error^2 + rate * bits`` is found by dynamic programming (:mod:`octavo.methods.quantize.viterbi`). Columns
    follow one another as in the method ``entropy``, in the same units and with the same feedback of errors.

    At few bits the codes of the two quantizers differ much, since only the even one has a zero. Their tables are
    separate, and so are the lengths that the search counts with.

    Parameters
    ----------
    rate
        Weight of one bit relative to the squared error in units of the step; up to twice as much where steps are larger
        than the weights' deviation.
    levels
        Steps to try, stated as the bits per Gaussian weight at a high rate.
    """

    by_rows = True
    takes = ("step",)

    rate: float = 0.1
    levels: tuple[float, ...] = (10.5, 9, 7.75, 6.5, 5.5, 4.75, 4, 3.25, 2.5, 1.75, 1.25, 0.8)

    def accepts(self, site: Site) -> bool:
        """Paths go down the columns, so there must be several rows."""
        return site.kind != "vector"

    def encode_all(self, weight: Tensor, settings: Iterable[Setting], evidence: Evidence) -> Iterator[Form]:
        """All settings share the factorisation; each is one pass over the columns."""
        units = StepUnits(self.name, weight, evidence)
        for setting in settings:
            step = real(self.name, setting, "step", 1e-38)
            coarse = step / (units.deviation or step)
            share = (coarse - _COARSE[0]) / (_COARSE[1] - _COARSE[0])
            rate = self.rate * (1 + min(max(share, 0.0), 1.0))
            search = _Search(weight.shape[1], rate, split=coarse > _SPLIT)
            # The step of the grid is the distance between the levels of both quantizers.
            half = step / 2
            yield Trellis(units.grid(half, search.at_once, search.in_turn, chunk=_CHUNK, multiple=LANES))


class _Search:
    """Codes of a matrix, chunk by chunk: lanes continue from the states at the end of the last chunk."""

    def __init__(self, columns: int, rate: float, *, split: bool) -> None:
        self._states = np.zeros((columns, LANES), np.int64)
        lengths = code_lengths(Magnitudes.means)
        if not split:
            lengths = -torch.log2((2.0**-lengths).mean(0, keepdim=True)).expand_as(lengths)
        # Penalties are for errors in units of half a step.
        self._penalties = np.ascontiguousarray((4 * rate * lengths).float().numpy())

    def at_once(self, targets: Tensor) -> Tensor:
        """Codes of targets (rows, columns) without feedback."""
        columns = targets.t().contiguous()
        quantize = self._quantizer(columns)
        return torch.stack([quantize(j, column) for j, column in enumerate(columns)]).t().div(2).floor_()

    def in_turn(self, targets: Tensor, feedback: Tensor) -> Tensor:
        """Codes of targets (columns, rows) with feedback."""
        quick = viterbi.sweep()
        if quick is None:
            return round_columns(targets, feedback, self._quantizer(targets)).div_(2).floor_()
        size = targets.abs()
        rows, columns = (offsets.int().numpy() for offsets in Magnitudes(size.mean(0), size.mean(1)).offsets())

        def sweep(start: int, *block: Tensor) -> None:
            span = slice(start, start + len(block[0]))
            arrays = (tensor.numpy() for tensor in block)
            quick(*arrays, rows, columns[span], self._penalties.shape[1] - 1, self._penalties, self._states[span])

        return round_blocks(targets, feedback, sweep).div_(2).floor_()

    def _quantizer(self, targets: Tensor) -> Callable[[int, Tensor], Tensor]:
        """The function that gives the levels of a column from its target, (rows,) both."""
        size, missing = targets.abs(), -targets.shape[1] % LANES
        magnitudes = Magnitudes(size.mean(0), size.mean(1))
        known: dict[int, np.ndarray] = {}

        def quantize(column: int, target: Tensor) -> Tensor:
            key = magnitudes.key(column)
            if key not in known:
                known[key] = np.pad(magnitudes.classes(key).int().numpy(), (0, missing))
            padded = np.pad(target.numpy(), (0, missing))
            levels = viterbi.best_path(padded, known[key], self._penalties, self._states[column])
            return torch.from_numpy(levels[: len(target)])

        return quantize


def code_lengths(means: Tensor) -> Tensor:
    """Bits of the codes -32 to 31, (2, means, 64), for Laplacian targets of these mean magnitudes in half steps.

    Both quantizers round to the nearest level, a step wide, and the coder knows which one was used.
    """
    codes, means = torch.arange(-_CODES // 2, _CODES // 2, dtype=torch.float64), means[:, None]

    def mass(low: Tensor, high: Tensor) -> Tensor:
        """Probability of an interval, computed on each side of zero so that small values stay precise."""
        right = torch.exp(-low.clamp_min(0) / means) - torch.exp(-high.clamp_min(0) / means)
        left = torch.exp(high.clamp_max(0) / means) - torch.exp(low.clamp_max(0) / means)
        return (right + left) / 2

    even, odd = mass(2 * codes - 1, 2 * codes + 1), mass(2 * codes, 2 * codes + 2)
    return -torch.log2(torch.stack([even, odd]).clamp_min(2.0**-_LONGEST))
