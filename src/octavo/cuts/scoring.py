"""Scores of units that need no decomposition: what a cut is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from octavo.cuts.base import Units
from octavo.cuts.decoder import Moments, blocks
from octavo.cuts.decomposition import pair_scores


@torch.no_grad()
def magnitudes(model: nn.Module, units: Sequence[Units]) -> dict[str, Tensor]:
    """The product of the sums of squares of everything that hangs on a unit, matrix by matrix: (count,) by name."""
    own = model.state_dict()

    def energy(name: str, dim: int, places: Tensor) -> Tensor:
        weight = own[name].double().square().movedim(dim, 0).flatten(1).sum(1)
        return weight[places.to(weight.device)].flatten(1).sum(1)

    return {
        part.name: torch.stack(
            [energy(piece.tensor, piece.dim, piece.places) for piece in part.slices if own[piece.tensor].ndim > 1]
        ).prod(0)
        for part in units
    }


@torch.no_grad()
def output_energies(model: nn.Module, moments: Sequence[Moments]) -> dict[str, Tensor]:
    """What a unit of a decoder adds to the output on the data observed: (count,) by the names of MoDeGPT's units.

    It is the mean square of a neuron or a value times the energy of the columns that read it, and for pairs of rotated
    dimensions what MoDeGPT itself takes.
    """
    found: dict[str, Tensor] = {}
    for block, seen in zip(blocks(model), moments, strict=True):
        down, output = (block.linear(f"{path}_proj").weight.double() for path in ("mlp.down", "self_attn.o"))
        found[f"{block.name}:mlp"] = seen.neurons.diagonal() * down.square().sum(0)
        read = output.square().sum(0).view(block.shared, block.group, block.size).sum(1)
        for head, pairs in enumerate(pair_scores(seen.queries, seen.keys)):
            found[f"{block.name}:query-key.{head}"] = pairs
            found[f"{block.name}:value-output.{head}"] = seen.values[head].diagonal() * read[head]
    return found
