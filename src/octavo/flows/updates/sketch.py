"""Sketch: projections on directions that both sides draw from a seed, so that only numbers are sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from octavo import coding
from octavo.errors import RequestError
from octavo.flows.base import flow
from octavo.flows.schema import Schema
from octavo.flows.updates.base import UpdateCodec
from octavo.flows.updates.codes import expect, pack_floats, unpack_floats

#: Numbers of magnitudes of a code, of which a fit takes the best.
_LEVELS = (1, 3, 7, 15, 31, 63, 127)
#: Step and end of grids for normal values, in standard deviations.
_THREE, _END = 1.22, 3.5


@flow("sketch", source="EvoFed's shared directions in partitions (Rahimi et al., 2023); Hadamard: arXiv 1611.00429")
@dataclass(frozen=True)
class Sketch(UpdateCodec):
    """The projection of every part on some rows of a Hadamard matrix whose columns have random signs.

    Such directions are orthogonal, so that the projection is the least-squares estimate; EvoFed draws Gaussian ones.
    Of ``part`` elements ``N`` numbers are sent, on a grid with one step of least squared error. About ``N / part`` of
    the squared norm arrives, whatever the update. The codec is biased: what no direction saw is lost without feedback.
    Signs and rows come from Philox, seeded by the step: on every machine they are the same.

    Parameters
    ----------
    part
        Elements of a part: a power of two. The last part is padded with zeros.
    """

    parts: ClassVar[int] = 2

    part: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.part) is not int or not 1 < self.part <= 1 << 20 or self.part & (self.part - 1):
            raise RequestError(f"sketch: part is {self.part!r}; give a power of two, such as 4096")

    def choices(self) -> list[dict[str, Any]]:
        """Every number of levels."""
        return [{"levels": count} for count in _LEVELS]

    def most(self, schema: Schema) -> int:
        """All directions of all parts."""
        width = self._width(schema)
        return -(-schema.elements // width) * width

    def prepare(self, flat: Tensor, schema: Schema, choice: Mapping[str, Any], step: int) -> tuple[float, Tensor]:
        """A unit, and in it the projections on all directions, direction by direction."""
        signs, order = _drawn(self._width(schema), step)
        rows = torch.nn.functional.pad(flat, (0, self.most(schema) - len(flat))).view(-1, len(signs))
        # In units of the largest entry, so that sums stay floats.
        unit = float(flat.abs().max()) if len(flat) else 0.0
        return unit, _hadamard(rows / (unit or 1.0) * signs)[:, order].T.flatten()

    def pack(
        self, prepared: tuple[float, Tensor], schema: Schema, amount: int, choice: Mapping[str, Any]
    ) -> Sequence[bytes]:
        """Codes of the first directions, and their step."""
        unit, values = prepared[0], prepared[1][:amount].double()
        levels = choice["levels"]
        # Projections are about normal: the grid ends where hardly any lie, and begins where three values serve best.
        spread = float(values.square().mean().sqrt()) if amount else 0.0
        codes = (values / ((min(_THREE, _END / levels) * spread) or 1.0)).round().clamp(-levels, levels)
        step = (values * codes).sum() / codes.square().sum().clamp_min(1)
        return coding.encode(codes.to(torch.int8)), pack_floats(unit * step[None])

    def unpack(self, parts: Sequence[memoryview], schema: Schema, step: int) -> Tensor:
        """The projection."""
        header, most = coding.describe(parts[0]), self.most(schema)
        expect(header.dtype == torch.int8 and len(header.shape) == 1, "its codes are not small integers")
        expect(header.elements <= most, f"{header.elements} numbers of {most}")
        (scale,) = unpack_floats(parts[1], 1)
        codes = coding.decode(parts[0], max_elements=header.elements)
        signs, order = _drawn(self._width(schema), step)
        values = torch.nn.functional.pad(codes.float(), (0, most - len(codes)))
        rows = torch.empty(most // len(signs), len(signs))
        rows[:, order] = values.view(len(signs), -1).T
        return (_hadamard(rows) * signs * scale).flatten()[: schema.elements]

    def _width(self, schema: Schema) -> int:
        """Elements of a part: fewer where all tensors have fewer."""
        return min(self.part, 1 << max(schema.elements - 1, 1).bit_length())


def _drawn(width: int, step: int) -> tuple[Tensor, Tensor]:
    """Signs and the order of directions of a step; raw bits only, since these never change between versions."""
    bits = np.random.Philox(key=step).random_raw(2 * width)
    signs = torch.from_numpy(bits[:width] & 1).float().mul_(2).sub_(1)
    return signs, torch.from_numpy(np.argsort(bits[width:], kind="stable"))


def _hadamard(rows: Tensor) -> Tensor:
    """The orthonormal Hadamard transform of every row; it is its own inverse."""
    width, half = rows.shape[1], 1
    while half < width:
        pairs = rows.view(len(rows), width // (2 * half), 2, half)
        rows = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2).view(len(rows), width)
        half *= 2
    return rows / width**0.5
