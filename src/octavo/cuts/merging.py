"""Heads that stay take over the residual of those that go (Minitron, arXiv 2407.14679).

With heads ranked by their scores, ``K`` of ``L`` stay, and each of the last ``L - K`` of these is paired with one that
goes:

    head_i <- head_i + (head_i - head_{2K-i+1})    for i in 2K-L+1 .. K
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from octavo.cuts.base import Units, check_kept


@torch.no_grad()
def merged_heads(
    model: nn.Module, units: Sequence[Units], kept: Mapping[str, Tensor], scores: Mapping[str, Tensor]
) -> nn.Module:
    """A copy of a model whose last kept heads carry the residual of those that are about to go.

    Queries, keys and values take part; queries alone where several query heads share a key and value head.

    Parameters
    ----------
    units
        Units of the kind ``head``; others are left alone.
    kept, scores
        (count,) by the units' name, as for :meth:`octavo.cuts.Cut.apply`.

    Raises
    ------
    RequestError
        If ``kept`` does not fit the units.
    """
    check_kept(units, kept)
    made = copy.deepcopy(model)
    own = dict(made.named_parameters())
    for part in units:
        if part.kind != "head" or part.name not in kept or bool(kept[part.name].all()):
            continue
        order = scores[part.name].argsort(descending=True, stable=True)
        stays = [int(head) for head in order if kept[part.name][head]]
        goes = [int(head) for head in order if not kept[part.name][head]]
        *written, read = part.slices
        grouped = len({piece.places.shape for piece in written}) > 1
        for piece in written:
            if grouped and piece.places.shape != read.places.shape:
                continue
            weight = own[piece.tensor].movedim(piece.dim, 0)
            before = weight.clone()
            # The last of those that stay with the first of those that go, and so on.
            for ours, theirs in zip(reversed(stays), goes, strict=False):
                into, gone = piece.places[ours], piece.places[theirs]
                weight[into] = 2 * before[into] - before[gone]
    return made
