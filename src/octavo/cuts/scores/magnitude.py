"""Scores from weights alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from octavo.calibration.objective import Objective
from octavo.cuts.base import Units
from octavo.cuts.scores.base import Score, score, summed
from octavo.errors import RequestError
from octavo.sources.batches import Batch


@score("magnitude", source="Li et al., 2017, arXiv 1608.08710")
@dataclass(frozen=True)
class WeightMagnitude(Score[None]):
    """Geometric mean over matrices of the sum of squares of a unit's weights in each.

    Scaling what a unit writes up and what reads it down changes nothing that the model computes, and no score.
    """

    def observe(self, model: nn.Module, units: Sequence[Units], batches: Sequence[Batch], objective: Objective) -> None:
        """Nothing: weights are enough."""

    @torch.no_grad()
    def scores(self, model: nn.Module, units: Sequence[Units], seen: None) -> dict[str, Tensor]:
        """From the squares of all weights."""
        own = model.state_dict(keep_vars=True)
        return {part.name: _energy(part, own) for part in units}


def _energy(part: Units, own: dict[str, Tensor]) -> Tensor:
    if part.wholes:
        names = {name for each in part.wholes for name in each}
        return summed(part, {name: own[name].detach().double().square() for name in names})
    matrices = [piece for piece in part.slices if own[piece.tensor].ndim > 1]
    logs = torch.zeros(part.count, dtype=torch.float64)
    for piece in matrices:
        whole = own[piece.tensor].detach().double().square().movedim(piece.dim, 0).flatten(1).sum(1).cpu()
        logs += whole[piece.places].flatten(1).sum(1).log()
    return (logs / max(1, len(matrices))).exp()


@score("norm-scale", source="Liu et al., 2017, arXiv 1708.06519")
@dataclass(frozen=True)
class NormScale(Score[None]):
    """Sum of ``|gamma|`` of the norms that scale a unit, as network slimming takes those of batch normalization.

    It means most after training with a penalty on these scales.
    """

    def observe(self, model: nn.Module, units: Sequence[Units], batches: Sequence[Batch], objective: Objective) -> None:
        """Nothing: weights are enough."""

    @torch.no_grad()
    def scores(self, model: nn.Module, units: Sequence[Units], seen: None) -> dict[str, Tensor]:
        """From the weights of norms.

        Raises
        ------
        RequestError
            If no norm scales some of the units.
        """
        own = model.state_dict(keep_vars=True)
        scales = {
            f"{path}.weight": own[f"{path}.weight"].detach().abs()
            for path, module in model.named_modules()
            if "norm" in type(module).__name__.lower() and f"{path}.weight" in own
        }
        for part in units:
            if not any(piece.tensor in scales for piece in part.slices):
                raise RequestError(
                    f"norm-scale: no norm scales the units {part.name!r}; choose another score, such as taylor"
                )
        return {part.name: summed(part, scales) for part in units}
