"""Fitness: how near shared random perturbations come to a client's weights, so that only numbers are sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
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
#: How a perturbation is judged.
ESTIMATORS = ("paired", "single", "corrected")
#: Perturbations are whole multiples of its inverse: a last bit of a logarithm cannot make two machines differ.
_GRID = 256
#: Random numbers for one payload: about 400 MB while they are drawn.
_DRAWS = 1 << 23


@flow("fitness", source="EvoFed (Rahimi et al., 2023, NeurIPS)")
@dataclass(frozen=True)
class Fitness(UpdateCodec):
    """The sum of Gaussian perturbations ``e_j``, each times how much nearer it comes to the update ``D``.

    Both sides draw ``e_j`` from the step. With pairs, a number is ``|D + s e_j| - |D - s e_j|``: the difference of the
    fitness of ``e_j`` and ``-e_j``, which the source sends apart. Numbers are on a grid with one step of least squared
    error. Of ``N`` numbers for a part of ``d`` elements, about ``N / (N + d)`` of the squared norm arrives. The codec
    is biased: what no perturbation saw is lost without feedback, which the source does not have.

    Parameters
    ----------
    part
        Elements of a part, each with a population of its own; the last part is padded with zeros. Parts above 2896
        elements cannot have as many perturbations, since a payload draws at most eight million numbers.
    estimator
        ``paired`` as above; ``single`` has the fitness ``-|D - s e_j|`` less its mean, which the lengths of ``e_j``
        drown; ``corrected`` takes these known lengths out of the squared fitness, and leaves ``D e_j``.
    spread
        ``s`` as a multiple of the root mean square of ``D``. Near 1 single perturbations are as good as pairs; the
        source's deviations of 0.35 are tens of times the changes of a round.
    """

    parts: ClassVar[int] = 2

    feedback: bool = False
    part: int = 1024
    estimator: str = "paired"
    spread: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.part) is not int or not 1 < self.part <= 1 << 20:
            raise RequestError(f"fitness: part is {self.part!r}; give a whole number from 2 to {1 << 20}")
        if self.estimator not in ESTIMATORS:
            raise RequestError(f"fitness: estimator is {self.estimator!r}; choose from {', '.join(ESTIMATORS)}")
        if not 0 < self.spread < 1e6:
            raise RequestError(f"fitness: spread is {self.spread!r}; give a positive number, such as 1")

    def choices(self) -> list[dict[str, Any]]:
        """Every number of levels."""
        return [{"levels": count} for count in _LEVELS]

    def most(self, schema: Schema) -> int:
        """As many perturbations as elements of a part, or as can be drawn, for every part."""
        return self._parts(schema) * min(self._width(schema), max(1, _DRAWS // self._width(schema)))

    def prepare(self, flat: Tensor, schema: Schema, choice: Mapping[str, Any], step: int) -> tuple[float, Tensor, int]:
        """A unit, in it the parts (parts, width), and the step."""
        width, parts = self._width(schema), self._parts(schema)
        rows = torch.nn.functional.pad(flat, (0, parts * width - len(flat))).view(parts, width)
        # In units of the largest entry, so that squares stay floats.
        unit = float(flat.abs().max()) if len(flat) else 0.0
        return unit, rows / (unit or 1.0), step

    def pack(
        self, prepared: tuple[float, Tensor, int], schema: Schema, amount: int, choice: Mapping[str, Any]
    ) -> Sequence[bytes]:
        """Codes of the first numbers, perturbation by perturbation, and their step."""
        (unit, rows, step), levels = prepared, choice["levels"]
        drawn = perturbations(-(-amount // max(len(rows), 1)), rows.shape[1], step)
        values = self._judged(rows, drawn).T.flatten()[:amount]
        top = float(values.abs().max()) if amount else 0.0
        codes = (values * (levels / (top or 1.0))).round()
        made = _summed(codes.float(), drawn, len(rows))
        scale = (rows * made).sum(dtype=torch.float64) / made.double().square().sum().clamp_min(1e-30)
        return coding.encode(codes.to(torch.int8)), pack_floats(unit * scale[None])

    def unpack(self, parts: Sequence[memoryview], schema: Schema, step: int) -> Tensor:
        """The sum of perturbations."""
        header, most, count = coding.describe(parts[0]), self.most(schema), self._parts(schema)
        expect(header.dtype == torch.int8 and len(header.shape) == 1, "its codes are not small integers")
        expect(header.elements <= most, f"{header.elements} numbers of {most}")
        (scale,) = unpack_floats(parts[1], 1)
        codes = coding.decode(parts[0], max_elements=header.elements).float()
        drawn = perturbations(-(-len(codes) // max(count, 1)), self._width(schema), step)
        return (_summed(codes, drawn, count) * scale).flatten()[: schema.elements]

    def _judged(self, rows: Tensor, drawn: Tensor) -> Tensor:
        """A number for every part and perturbation, (parts, count) float64."""
        inner, squares = (rows @ drawn.T).double(), rows.double().square().sum(1, keepdim=True)
        if self.estimator == "corrected":
            return inner
        spread = self.spread * (squares / rows.shape[1]).sqrt()
        lengths = squares + spread.square() * drawn.double().square().sum(1)
        near, far = ((lengths + sign * 2 * spread * inner).clamp_min(0).sqrt() for sign in (-1, 1))
        return far - near if self.estimator == "paired" else near.mean(1, keepdim=True) - near

    def _width(self, schema: Schema) -> int:
        """Elements of a part: fewer where all tensors have fewer."""
        return min(self.part, max(schema.elements, 1))

    def _parts(self, schema: Schema) -> int:
        return -(-schema.elements // self._width(schema))


def _summed(codes: Tensor, drawn: Tensor, parts: int) -> Tensor:
    """Perturbations times their codes, (parts, width)."""
    whole = torch.nn.functional.pad(codes, (0, len(drawn) * parts - len(codes)))
    return whole.view(len(drawn), parts).T @ drawn


def perturbations(count: int, width: int, step: int) -> Tensor:
    """The first perturbations of a step, (count, width) float32: standard normal numbers by Box and Muller.

    Their raw bits are those of Philox with the step as its key, which never change between versions.
    """
    # A little more than is needed serves the next amount, too.
    return _normal(1 << max(count - 1, 0).bit_length(), width, step)[:count]


@lru_cache(maxsize=4)
def _normal(count: int, width: int, step: int) -> Tensor:
    even = count * (width + width % 2)
    uniform = ((np.random.Philox(key=step).random_raw(even) >> np.uint64(11)) + 1.0) * 2.0**-53
    length, turn = np.sqrt(-2 * np.log(uniform[::2])), 2 * np.pi * uniform[1::2]
    normal = np.stack([length * np.cos(turn), length * np.sin(turn)], 1).reshape(count, -1)[:, :width]
    return torch.from_numpy((np.round(normal * _GRID) / _GRID).astype(np.float32))
