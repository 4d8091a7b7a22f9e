"""Scores from how large the activations of units are, with forward passes alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from octavo.calibration.calibrating import differentiating
from octavo.calibration.objective import Objective
from octavo.cuts.base import Units
from octavo.cuts.readers import layers_watched, positions, readers_of, watched
from octavo.cuts.scores.base import Score, score
from octavo.errors import RequestError
from octavo.sources.batches import Batch
from octavo.system.matmul import fast_matmul

#: Ways to make one number of many: ``E|x|``, ``E[x^2]^(1/2)`` and ``E[x^2] - E[x]^2``.
AGGREGATIONS = ("mean", "l2", "variance")


@score("activation", source="Minitron (Muralidharan et al., 2024, arXiv 2407.14679)")
@dataclass(frozen=True)
class Activation(Score[dict[str, Tensor]]):
    """How large a unit's activations are: norms of a head's output, of a neuron, of a column after its norms.

    They are aggregated over the positions of a sequence first, and over sequences then. For columns all layers that
    read the stream are added up. The score of a layer is its influence ``1 - E[cos(input, output)]``.

    Parameters
    ----------
    sequence, batch
        Of :data:`AGGREGATIONS`, over positions and over sequences.
    """

    sequence: str = "mean"
    batch: str = "l2"

    def __post_init__(self) -> None:
        for name in ("sequence", "batch"):
            if getattr(self, name) not in AGGREGATIONS:
                raise RequestError(
                    f"activation: {name} is {getattr(self, name)!r}; choose one of {', '.join(AGGREGATIONS)}"
                )

    @fast_matmul()
    @torch.no_grad()
    def observe(
        self, model: nn.Module, units: Sequence[Units], batches: Sequence[Batch], objective: Objective
    ) -> dict[str, Tensor]:
        """Aggregated activations of all units.

        Raises
        ------
        RequestError
            If there are no batches.
        """
        sums = defaultdict[str, _Sums](_Sums)
        with differentiating(model):
            for batch in batches:
                for part in units:
                    if part.wholes:
                        self._layers(model, part, batch, objective, sums)
                self._units(model, units, batch, objective, sums)
        if not sums:
            raise RequestError("batches: there is nothing to observe; give at least one batch")
        found: dict[str, Tensor] = {}
        for part in units:
            keys = [part.name] if part.wholes else [_key(part, at) for at in range(len(readers_of(model, part)))]
            values = [sums[key].aggregated("mean" if part.wholes else self.batch) for key in keys if key in sums]
            if not values:
                raise RequestError(
                    f"activation: no layer reads the units {part.name!r} on this data; choose another score"
                )
            found[part.name] = torch.stack(values).sum(0)
        return found

    def _units(
        self, model: nn.Module, units: Sequence[Units], batch: Batch, objective: Objective, sums: dict[str, _Sums]
    ) -> None:
        found = {_key(part, at): one for part in units for at, one in enumerate(readers_of(model, part))}

        def seen(key: str, flow: Tensor) -> None:
            flat, mask = positions(flow, found[key].axis, batch)
            own = flat[..., found[key].places.to(flat.device)]
            values = own[..., 0] if own.shape[-1] == 1 else own.float().norm(dim=-1)
            sums[key].add(_over(values.double(), mask, self.sequence))

        with watched({key: one.module for key, one in found.items()}, seen):
            objective.outputs(model, batch)

    def _layers(
        self, model: nn.Module, part: Units, batch: Batch, objective: Objective, sums: dict[str, _Sums]
    ) -> None:
        moved: dict[int, Tensor] = {}

        def seen(number: int, before: Tensor, after: Tensor) -> None:
            flat, mask = positions(before, -1, batch)
            change = 1 - cosine_similarity(flat.double(), positions(after, -1, batch)[0].double(), dim=-1)
            moved[number] = _over(change[..., None], mask, "mean")[:, 0]

        with layers_watched(model, part, seen):
            objective.outputs(model, batch)
        sums[part.name].add(torch.stack([moved[number] for number in range(part.count)], 1))


def _key(part: Units, reader: int) -> str:
    return f"{part.name}@{reader}"


class _Sums:
    """Running sums over sequences of (sequences, units)."""

    def __init__(self) -> None:
        self.sums: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0
        self.count = 0

    def add(self, values: Tensor) -> None:
        self.sums, self.squares = self.sums + values.sum(0).cpu(), self.squares + values.square().sum(0).cpu()
        self.count += len(values)

    def aggregated(self, how: str) -> Tensor:
        mean, square = torch.as_tensor(self.sums) / self.count, torch.as_tensor(self.squares) / self.count
        return {"mean": mean, "l2": square.sqrt(), "variance": (square - mean.square()).clamp_min(0)}[how]


def _over(values: Tensor, mask: Tensor | None, how: str) -> Tensor:
    """(sequences, units) of (sequences, positions, units), without padding."""
    kept = torch.ones(values.shape[:2], device=values.device) if mask is None else mask
    weights = (kept / kept.sum(1, keepdim=True).clamp_min(1)).to(values)[..., None]
    if how == "mean":
        return (values.abs() * weights).sum(1)
    square = (values.square() * weights).sum(1)
    return square.sqrt() if how == "l2" else (square - (values * weights).sum(1).square()).clamp_min(0)
