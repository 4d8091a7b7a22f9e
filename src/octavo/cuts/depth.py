"""Depth: a run of neighbouring layers goes, by what the outputs lose without it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from octavo.calibration.calibrating import differentiating
from octavo.calibration.objective import Objective
from octavo.cuts.base import Units
from octavo.cuts.readers import gated
from octavo.errors import RequestError
from octavo.sources.batches import Batch, sequences_in
from octavo.system.matmul import fast_matmul


@fast_matmul()
@torch.no_grad()
def losses_without(
    model: nn.Module, layers: Units, count: int, batches: Sequence[Batch], objective: Objective
) -> Tensor:
    """Mean divergence of the outputs without ``count`` neighbouring layers, (layers - count + 1,) by the first of them.

    Minitron drops contiguous layers by their effect on perplexity; here it is that on the objective.

    Parameters
    ----------
    layers
        The units of one list of layers.

    Raises
    ------
    RequestError
        If these units are not layers, or fewer than one would stay.
    """
    if not layers.wholes or not 0 < count < layers.count:
        raise RequestError(
            f"{layers.name!r}: {count} of {layers.count} units of the kind {layers.kind!r} cannot go as a run of "
            "layers; give units of the kind 'layer', and leave at least one"
        )
    total, seen = torch.zeros(layers.count - count + 1, dtype=torch.float64), 0
    device = next(model.parameters()).device
    with differentiating(model):
        for batch in batches:
            reference = objective.outputs(model, batch)
            for first in range(len(total)):
                gate = torch.ones(1, layers.count, device=device)
                gate[:, first : first + count] = 0
                with gated(model, [layers], {layers.name: gate}):
                    total[first] += float(objective.divergence(reference, objective.outputs(model, batch)).sum())
            seen += sequences_in(batch)
    return total / max(1, seen)


def without_run(layers: Units, losses: Tensor) -> dict[str, Tensor]:
    """The layers that stay: all but the run whose removal loses least.

    Parameters
    ----------
    losses
        (runs,) from :func:`losses_without`. Any other worth works too, such as sums of the influence of layers.

    Examples
    --------
    >>> layers = Units("h:layer", "layer", 4, (), wholes=((), (), (), ()))
    >>> without_run(layers, torch.tensor([0.3, 0.1, 0.2]))["h:layer"].tolist()
    [True, False, False, True]
    """
    first, count = int(losses.argmin()), layers.count - len(losses) + 1
    numbers = torch.arange(layers.count)
    return {layers.name: (numbers < first) | (numbers >= first + count)}
