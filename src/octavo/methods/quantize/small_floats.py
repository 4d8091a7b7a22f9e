"""Floating-point values of 4 to 8 bits with a scale for each block, as accelerators multiply them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import torch
from torch import Tensor

from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.forms import BlockScaled, Codebook, Dense, Form
from octavo.methods.base import Method, Setting, method
from octavo.methods.feedback import factored, round_columns, swept
from octavo.methods.knobs import choice, whole
from octavo.methods.quantize.grids import compact

#: Bits of the exponent and of the mantissa, and how many of the largest magnitudes stand for Inf and NaN.
VALUES = MappingProxyType(
    {"e5m2": (5, 2, 4), "e4m3": (4, 3, 1), "e3m2": (3, 2, 0), "e2m3": (2, 3, 0), "e2m1": (2, 1, 0)}
)
#: The scales of blocks: powers of two, or e4m3 values times one float32 of the matrix, or float16.
POWER, E4M3, FLOAT = "power", "e4m3", "float16"
#: The exponents of e8m0.
_EXPONENTS = 127
#: Scales that are tried are those at the largest magnitude, and so many of the format on either side.
_NEIGHBOURS = (0, 1, -1, -2)


@cache
def values_of(name: str) -> Tensor:
    """All finite values of a format in rising order, (count,) float32; zero once.

    Examples
    --------
    >>> values_of("e2m1").tolist()
    [-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    exponent, mantissa, reserved = VALUES[name]
    codes = torch.arange(2 ** (exponent + mantissa) - reserved)
    field, fraction = codes >> mantissa, (codes & (2**mantissa - 1)).double() / 2**mantissa
    bias = 2 ** (exponent - 1) - 1
    size = torch.where(field > 0, 1 + fraction, fraction) * torch.exp2((field.clamp_min(1) - bias).double())
    return torch.cat([-size.flip(0)[:-1], size]).float()


@method("small-floats", family="quantize", preset="best", source="OCP Microscaling Formats 1.0 (2023); NVFP4")
@dataclass(frozen=True)
class SmallFloats(Method):
    """``W[i, j] = scale[i, g] * value[i, j]`` with values of a small floating-point format, and blocks of columns.

    Words for settings: ``mxfp8``, ``mxfp6`` and ``mxfp4`` have a power of two for 32 columns, ``nvfp4`` an e4m3 scale
    for 16 columns. Of a few scales that the format has near the block's largest magnitude, the one of least error is
    taken, weighted by the diagonal of the inputs' second moment. Columns are then rounded with error feedback.

    Parameters
    ----------
    feedback
        Let later columns compensate the errors of earlier ones, as in GPTQ.
    """

    by_rows = True
    takes = ("values", "group", "scale")
    words = MappingProxyType(
        {
            "mxfp8": {"values": "e4m3", "group": 32, "scale": POWER},
            "mxfp6": {"values": "e2m3", "group": 32, "scale": POWER},
            "nvfp4": {"values": "e2m1", "group": 16, "scale": E4M3},
            "mxfp4": {"values": "e2m1", "group": 32, "scale": POWER},
        }
    )

    feedback: bool = True

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """The named formats, largest first."""
        return [dict(setting) for setting in self.words.values()]

    def encode(self, weight: Tensor, setting: Setting, evidence: Evidence) -> Form:
        """Scales first, then columns one after another."""
        values = values_of(choice(self.name, setting, "values", tuple(VALUES)))
        kind = choice(self.name, setting, "scale", (POWER, E4M3, FLOAT))
        weight, columns = weight.float(), weight.shape[1]
        if not bool(torch.isfinite(weight).all()):
            raise RequestError(f"{self.name}: the weight holds NaN or Inf; repair the source")
        groups = -(-columns // min(whole(self.name, setting, "group", 1), columns))
        width = -(-columns // groups)
        groups = -(-columns // width)
        padded = torch.nn.functional.pad(weight, (0, groups * width - columns)).view(len(weight), groups, width)
        cost = torch.ones(columns) if evidence.columns is None else evidence.columns.diagonal().float()
        cost = torch.nn.functional.pad(cost, (0, groups * width - columns)).view(groups, width)
        scales = _SCALES[kind](padded, values, cost)
        codes = self._codes(weight, scales.dense(), width, values, evidence)
        return BlockScaled(Codebook(codes, values.half()), scales)

    def _codes(self, weight: Tensor, scales: Tensor, width: int, values: Tensor, evidence: Evidence) -> Tensor:
        edges, places = (values[1:] + values[:-1]) / 2, torch.arange(weight.shape[1]) // width
        if evidence.columns is None or not self.feedback:
            return torch.bucketize(weight / scales[:, places], edges, out_int32=True).to(torch.uint8)
        order, _, feedback = factored(evidence)

        def codes(rows: slice, targets: Tensor) -> Tensor:
            steps = scales[rows].t()[places[order]].contiguous()

            def nearest(j: int, target: Tensor) -> Tensor:
                return values[torch.bucketize(target / steps[j], edges)] * steps[j]

            # Values are multiples of their scales, to a rounding error that moves none across an edge.
            return torch.bucketize(round_columns(targets, feedback, nearest) / steps, edges)

        return swept(weight, order, codes, dtype=torch.uint8)


def _best(blocks: Tensor, values: Tensor, cost: Tensor, tables: Tensor, first: Tensor) -> Tensor:
    """Places (rows, groups) in a rising table of scales, near the given ones, of least weighted squared error."""
    edges, best, least = (values[1:] + values[:-1]) / 2, first, torch.full(first.shape, torch.inf)
    for shift in _NEIGHBOURS:
        places = (first + shift).clamp(0, len(tables) - 1)
        scale = tables[places][..., None]
        error = blocks - values[torch.bucketize(blocks / scale, edges)] * scale
        lost = (error.square_() * cost).sum(2)
        best, least = torch.where(lost < least, places, best), torch.minimum(lost, least)
    return best


def _powers(blocks: Tensor, values: Tensor, cost: Tensor) -> Form:
    """Powers of two: e8m0."""
    largest = blocks.abs().amax(2)
    first = torch.frexp(largest)[1] - torch.frexp(values[-1])[1]
    first = torch.where(largest > 0, first, -_EXPONENTS).long().clamp_(-_EXPONENTS, _EXPONENTS - 1) + _EXPONENTS
    tables = torch.ldexp(torch.ones(2 * _EXPONENTS), torch.arange(-_EXPONENTS, _EXPONENTS))
    places = _best(blocks, values, cost, tables, first)
    low, high = int(places.min()), int(places.max())
    # Powers of two are exact in bfloat16, which has the range of float32; smaller ones lose nothing that counts.
    return Codebook((places - low).to(torch.uint8), tables[low : high + 1].bfloat16())


def _floats(blocks: Tensor, values: Tensor, cost: Tensor) -> Form:
    """Values of e4m3, times a float32 of the matrix by which the largest block has the largest of them."""
    positive = values_of("e4m3")
    positive = positive[positive > 0]
    largest = blocks.abs().amax(2)
    factor = float(largest.max()) / float(values[-1] * positive[-1]) or 1.0
    tables = positive * max(factor, torch.finfo(torch.float32).tiny)
    first = torch.bucketize(largest / values[-1], tables).clamp_max_(len(tables) - 1)
    return Codebook(_best(blocks, values, cost, tables, first).to(torch.uint8), tables)


def _plain(blocks: Tensor, values: Tensor, cost: Tensor) -> Form:
    """A float16 for each block, at its largest magnitude."""
    return Dense(compact(blocks.abs().amax(2) / values[-1]))


_SCALES: dict[str, Callable[[Tensor, Tensor, Tensor], Form]] = {POWER: _powers, E4M3: _floats, FLOAT: _plain}
