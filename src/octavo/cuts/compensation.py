"""What is left compensates for what goes: the matrix that reads units is fitted again to what it wrote.

A matrix ``W`` reads ``x`` and writes ``y = W x + b``. Inputs of ``S`` stay and those of ``G`` go. The nearest outputs
are those of

    [W' b'] = [W_S b] + W_G C[G, S+1] (C[S+1, S+1] + damping)^-1,    C = E[[x 1] [x 1]^T / mean((W x)^2)]

This is one small system of equations for each matrix, and needs no training. Errors count relative to what is written,
position by position: a few tokens have huge activations and would decide alone. The damping is strong, and draws ``W'``
towards ``W_S``, since what the matrix reads in the cut model is not quite what was observed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from octavo.calibration.calibrating import differentiating
from octavo.calibration.objective import Objective
from octavo.cuts.base import Units
from octavo.cuts.readers import UnitReader, positions, readers_of, watched
from octavo.sources.batches import Batch
from octavo.system.matmul import fast_matmul, gram

#: Added to the diagonal of moments, as a multiple of its mean. Of 0.001 to 100 it was best for half of MiniLM.
_DAMPING = 10.0


@dataclass(frozen=True)
class Moment:
    """``E[[x 1] [x 1]^T / mean((W x)^2)]`` of what one matrix reads, (inputs + 1, inputs + 1) in float64."""

    matrix: Tensor


@fast_matmul()
@torch.no_grad()
def reader_moments(
    model: nn.Module, units: Sequence[Units], batches: Sequence[Batch], objective: Objective
) -> dict[str, Moment]:
    """Moments of the inputs of all matrices that alone read some units, by the name of their weight."""
    found = {reader.name: reader for _, reader in _alone(model, units)}
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(found, 0)
    with differentiating(model):
        for batch in batches:

            def seen(name: str, flow: Tensor, batch: Batch = batch) -> None:
                flat, mask = positions(flow, -1, batch)
                rows = (flat.flatten(0, 1) if mask is None else flat[mask]).float()
                size = found[name].written(rows).square().mean(1, keepdim=True)
                size = size.clamp_min(1e-6 * float(size.mean()) + 1e-30).sqrt()
                rows = nn.functional.pad(rows, (0, 1), value=1.0) / size
                moment = gram(rows).double()
                sums[name] = sums[name] + moment if name in sums else moment
                counts[name] += len(rows)

            with watched({name: reader.module for name, reader in found.items()}, seen):
                objective.outputs(model, batch)
    return {name: Moment(total / counts[name]) for name, total in sums.items()}


@torch.no_grad()
def compensate(
    thinner: nn.Module, units: Sequence[Units], kept: Mapping[str, Tensor], moments: Mapping[str, Moment]
) -> None:
    """Fit matrices again that are about to lose inputs, in place; what they lose is still there."""
    for part, reader in _alone(thinner, units):
        mask = kept.get(part.name)
        if mask is None or bool(mask.all()) or reader.name not in moments:
            continue
        moment = moments[reader.name].matrix
        stays = torch.ones(len(moment), dtype=torch.bool)
        stays[reader.places[~mask.cpu()].flatten()] = False
        _fit(reader, stays, moment)


def _alone(model: nn.Module, units: Sequence[Units]) -> Iterator[tuple[Units, UnitReader]]:
    """Units that one matrix reads and no other, with it."""
    for part in units:
        readers = readers_of(model, part)
        if len(readers) == 1 and readers[0].axis == -1:
            yield part, readers[0]


def _fit(reader: UnitReader, stays: Tensor, moment: Tensor) -> None:
    """Fit the columns that stay, and the bias if there is one."""
    weight, bias = reader.module.weight, reader.module.bias
    assert isinstance(weight, Tensor)
    turned = not isinstance(reader.module, nn.Linear)
    whole = (weight.t() if turned else weight).double()
    if isinstance(bias, Tensor):
        whole = torch.cat([whole, bias.double()[:, None]], 1)
    else:
        stays, moment = stays[:-1], moment[:-1, :-1]
    stays, moment = stays.to(whole.device), moment.to(whole.device)
    inner = moment[stays][:, stays]
    inner = inner + _DAMPING * inner.diagonal().mean() * torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
    moved = torch.linalg.solve(inner, moment[stays][:, ~stays] @ whole[:, ~stays].t()).t()
    fitted = whole[:, stays] + moved
    if isinstance(bias, Tensor):
        bias.copy_(fitted[:, -1])
        fitted, stays = fitted[:, :-1], stays[:-1]
    (weight.t() if turned else weight)[:, stays] = fitted.to(weight.dtype)
