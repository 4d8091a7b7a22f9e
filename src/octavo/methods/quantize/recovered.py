"""Recovering the exact grid of an already quantized source: lossless, and smaller than its file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.forms import Affine, Form
from octavo.methods.base import Method, Setting, method
from octavo.methods.knobs import flag, whole
from octavo.methods.quantize.lattice import find, precision_of

#: Groups tested first: a few suffice to distinguish an ordinary matrix from a quantized one.
_SAMPLE = 32
_CHUNK = 1 << 20


@method(
    "source-grid",
    family="quantize",
    preset="fast",
    source="Formats of GGUF, GPTQ (arXiv 2210.17323) and AWQ (arXiv 2306.00978); the recovery is Octavo's",
)
@dataclass(frozen=True)
class SourceGrid(Method):
    """Lossless codes, steps and offsets of a matrix that was quantized before.

    ``W[i, j] = round(step[i, g] * codes[i, j] + offset[i, g])`` bit for bit, with ``g = j // width`` and offsets only
    if needed (:mod:`octavo.methods.quantize.lattice` explains how they are found). A matrix that is not reproduced
    exactly gets no setting, and most matrices are rejected after a few groups.

    Parameters
    ----------
    widths
        Group sizes to try besides whole rows; from wide to narrow, since half a group is on the same grid.
    """

    takes = ("width", "offset")

    widths: tuple[int, ...] = (256, 128, 64, 32, 16)

    lossless = True

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """The widest group size at which every sampled group is on a grid, or None."""
        for width in dict.fromkeys((weight.shape[1], *self.widths)):
            if width < min(self.widths) or weight.shape[1] % width:
                continue
            groups = weight.reshape(-1, width)
            sample = groups[:: -(-len(groups) // _SAMPLE)]
            precision = precision_of(sample)
            for offset in (False, True):
                # One group rules out nearly every matrix that was not quantized.
                if all(find(some, precision, offset=offset) is not None for some in (sample[:1], sample)):
                    return [{"width": width, "offset": offset}]
        return []

    def encode(self, weight: Tensor, setting: Setting, evidence: Evidence) -> Form:  # noqa: D102
        found = self._recovered(weight, setting)
        if found is None:
            raise RequestError(
                f"{self.name}: not every group of {setting['width']} columns of this matrix is on a grid; choose "
                "another width or method"
            )
        return found

    def encode_all(self, weight: Tensor, settings: Iterable[Setting], evidence: Evidence) -> Iterator[Form]:
        """Yields no form if groups outside of the sample are not on a grid."""
        found = (self._recovered(weight, setting) for setting in settings)
        return (form for form in found if form is not None)

    def _recovered(self, weight: Tensor, setting: Setting) -> Form | None:
        width = whole(self.name, setting, "width", min(self.widths))
        rows, columns = weight.shape
        if columns % width:
            raise RequestError(
                f"{self.name}: groups of {width} do not divide the {columns} columns of this matrix; choose another "
                "width"
            )
        precision, offset = precision_of(weight), flag(self.name, setting, "offset")
        pieces = []
        for piece in weight.reshape(-1, width).split(max(1, _CHUNK // width)):
            found = find(piece, precision, offset=offset)
            if found is None:
                return None
            pieces.append(found)
        codes = torch.cat([piece.codes for piece in pieces]).view(rows, columns)
        step = torch.cat([piece.step for piece in pieces]).view(rows, -1)
        offsets = [piece.offset for piece in pieces if piece.offset is not None]
        low = torch.cat(offsets).view(rows, -1) if offsets else None
        return Affine(codes, step, low, precision)
