"""CNNpack: centres of cosine coefficients, and what they miss in few bits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.forms import Form, Frequency, Grid, Sum, Vectors
from octavo.methods.base import Setting, method
from octavo.methods.knobs import real, whole
from octavo.methods.quantize import centres
from octavo.methods.quantize.grids import compact
from octavo.methods.quantize.spectral import Spectral

#: Bits of a residual at a high rate, and numbers of centres.
_LEVELS, _CENTRES = (8, 6, 5, 4, 3, 2.25, 1.5, 0.75), (0, 16, 128)
#: Codes stay below it.
_LARGEST = 2**30
_MOST_CENTRES = 65536


@method("cnnpack", family="quantize", preset="named", source="CNNpack (Wang et al., 2016), NeurIPS 29")
@dataclass(frozen=True)
class CNNpack(Spectral):
    """``W = D^T (centre[k] + scale codes) D``: kernels by their cosine coefficients.

    Coefficients of every kernel, or of every 16 weights of a row, have the nearest of some centres, which k-means
    learns. The residual ``r`` is shrunk, ``sign(r) max(|r| - threshold step, 0)``, and divided by ``step``. That solves
    ``min |x - r|^2 + 2 threshold step |x|_1``. ``scale`` is then fitted, because shrinking makes codes too small. Codes
    are not clipped; large ones are few, and cost an entropy coder little.

    Parameters
    ----------
    iterations
        Of k-means.
    """

    takes = ("step", "threshold", "centres")
    elastic = "step"
    tile = (1, 16)

    iterations: int = 25

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """Steps from fine to coarse, without centres and with few for the vectors."""
        coefficients, _, (_, height, width) = self.moved(weight, evidence)
        peak = float(coefficients.abs().max()) or 1.0
        deviation = float((coefficients / peak).square().mean().sqrt()) * peak or 1.0
        vectors = weight.numel() // (height * width)
        numbers = [number for number in _CENTRES if 16 * number <= vectors]
        return [
            {"step": float(f"{deviation * 2 ** (2.05 - level):.5g}"), "threshold": 0.25, "centres": number}
            for level in _LEVELS
            for number in numbers
        ]

    def encode(self, weight: Tensor, setting: Setting, evidence: Evidence) -> Form:  # noqa: D102
        return next(self.encode_all(weight, [setting], evidence))

    def encode_all(self, weight: Tensor, settings: Iterable[Setting], evidence: Evidence) -> Iterator[Form]:
        """Settings with as many centres share them."""
        coefficients, moved, block = self.moved(weight, evidence)
        known: dict[int, Vectors] = {}
        for setting in settings:
            step, threshold = real(self.name, setting, "step", 1e-38), real(self.name, setting, "threshold", 0, 1e6)
            number = whole(self.name, setting, "centres", 0, _MOST_CENTRES)
            if not number:
                yield Frequency(self._codes(coefficients, step, threshold), block)
                continue
            if number not in known:
                known[number] = self._centres(coefficients, moved, block[1] * block[2], number)
            base = known[number]
            yield Frequency(Sum(base, self._codes(coefficients - base.dense(), step, threshold)), block)

    def _centres(self, coefficients: Tensor, evidence: Evidence, width: int, number: int) -> Vectors:
        """The nearest centre of every vector, with the costs of rows as weights."""
        rows, columns = coefficients.shape
        deviation = compact(coefficients.square().mean().sqrt().reshape(1, 1))
        vectors = (coefficients / deviation.float()).reshape(-1, width)
        if number > len(vectors):
            raise RequestError(
                f"{self.name}: {number} centres for {len(vectors)} vectors of {width} coefficients; give fewer"
            )
        cost = (evidence.rows / evidence.rows.max().clamp_min(1e-30)).clamp_min(1e-9)
        cost = cost.repeat_interleave(columns // width)
        cost = cost[:, None].expand_as(vectors)
        draws = torch.Generator().manual_seed(0)
        book = centres.learned(vectors, cost, number, self.iterations, draws).half()
        codes = centres.nearest(vectors, book.float(), cost).view(1, rows, -1)
        return Vectors(codes.to(torch.uint8 if number <= 256 else torch.int32), book[None, None], columns, deviation)

    def _codes(self, residual: Tensor, step: float, threshold: float) -> Grid:
        """The shrunk residual in steps, and the scale of least squared error."""
        size = ((residual.abs() / step) - threshold).clamp_min_(0).add_(0.5).floor_()
        largest = float(size.max())
        if not largest < _LARGEST:
            raise RequestError(
                f"{self.name}: a step of {step:g} is too fine for this matrix, as its codes exceed {_LARGEST}; "
                "choose a coarser step"
            )
        energy = float(size.double().square().sum())
        scale = float((size.double() * residual.abs().double()).sum()) / energy if energy else step
        codes = size.copysign_(residual)
        dtype = torch.int8 if largest < 128 else torch.int16 if largest < 32768 else torch.int32
        return Grid(codes.to(dtype), torch.full((1, 1), scale))
