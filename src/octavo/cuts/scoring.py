"""A score of units that needs no decomposition: what a cut is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from octavo.cuts.decoder import Moments, blocks
from octavo.cuts.decomposition import pair_scores


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
