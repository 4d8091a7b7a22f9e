"""Channels whose scale is near zero are nearly constant: what reads them takes their mean into its bias."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from octavo.cuts.base import Units, check_kept
from octavo.cuts.readers import readers_of
from octavo.errors import RequestError
from octavo.sources.batches import Batch, run
from octavo.system.modes import evaluating


def by_norms(units: Sequence[Units], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Which units stay, from the channels of normalizations that stay.

    Coupled channels, as those of a residual connection, stay if one of their normalizations keeps them.

    Parameters
    ----------
    kept
        (channels,) bools by the name of the normalization, as :class:`octavo.training.regimens.slimming.Slimming`
        hands them over.

    Raises
    ------
    RequestError
        If a normalization scales none of the units.
    """
    found: dict[str, Tensor] = {}
    used = set()
    for part in units:
        for piece in part.slices:
            name, _, leaf = piece.tensor.rpartition(".")
            if leaf == "weight" and name in kept:
                stays = kept[name].cpu()[piece.places].any(1)
                found[part.name] = found[part.name] | stays if part.name in found else stays
                used.add(name)
    if odd := sorted(set(kept) - used):
        raise RequestError(
            f"kept: {odd[0]!r} scales no unit of this model; its channels may have to stay, so leave it out"
        )
    return found


@torch.no_grad()
def carry(model: nn.Module, units: Sequence[Units], kept: Mapping[str, Tensor], batches: Iterable[Batch]) -> nn.Module:
    """A copy in which the means of what is about to go moved into the layers that read it; nothing is removed yet.

    A layer ``W x`` loses ``W[:, gone] x[gone]``. The mean of that over positions and examples, padding included, is
    added to the layer's bias, or taken from the running mean of the batch normalization behind it. One that has no
    running statistics takes it out by itself. Without any of them the layer stays as it is. Nothing changes in the
    outputs if what goes is constant and images are not padded.

    Parameters
    ----------
    kept
        (count,) bools by the units' name.
    batches
        Inputs from which the means are taken.

    Raises
    ------
    RequestError
        If ``kept`` does not fit the units, or a layer that reads them does not run.
    """
    check_kept(units, kept)
    moved: Any = copy.deepcopy(model)
    losses: dict[str, _Loss] = {}
    for part in units:
        for reader in readers_of(moved, part) if part.name in kept else ():
            loss = losses.setdefault(reader.name, _Loss(reader.module, reader.axis))
            loss.places += reader.places[~kept[part.name].cpu()].flatten().tolist()
    with evaluating(moved):
        _observe(moved, losses, batches)
    for name, loss in losses.items():
        if loss.total is None:
            raise RequestError(
                f"carry: {name!r} was not used by any batch, so no mean is known; give batches that use it"
            )
        mean = loss.total / loss.count
        if loss.layer.bias is not None:
            loss.layer.bias += mean.to(loss.layer.bias)
        elif loss.norm is not None and loss.norm.running_mean is not None:
            loss.norm.running_mean -= mean.to(loss.norm.running_mean)
    return moved


@dataclass
class _Loss:
    """What a layer is about to lose: the places in its input, and what it writes because of them."""

    layer: Any
    axis: int
    places: list[int] = field(default_factory=list)
    total: Tensor | None = None
    count: int = 0
    norm: Any = None

    def watch(self, inputs: Tensor) -> None:
        """Add up the outputs for inputs of which only these places are not zero."""
        gone = torch.zeros(inputs.shape[self.axis], dtype=torch.bool, device=inputs.device)
        gone[self.places] = True
        only = inputs * gone.reshape(-1, *[1] * (inputs.ndim - 1 - self.axis % inputs.ndim))
        # Not a call: that would run the hooks again.
        wrote = self.layer.forward(only) - self.layer.forward(torch.zeros_like(only[:1]))
        rows = wrote.movedim(self.axis, -1).flatten(0, -2)
        self.total = rows.double().sum(0) + (0 if self.total is None else self.total)
        self.count += len(rows)


def _observe(model: nn.Module, losses: Mapping[str, _Loss], batches: Iterable[Batch]) -> None:
    """Let every loss see the inputs of its layer, and find the batch normalization that reads what the layer writes."""
    written: dict[int, tuple[_Loss, Tensor]] = {}

    def layer(loss: _Loss) -> Any:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            loss.watch(args[0].detach())
            # The tensor is held, so that no other gets its number.
            written[id(output)] = (loss, output)

        return hook

    def norm(module: nn.Module, args: tuple) -> None:
        if id(args[0]) in written:
            written[id(args[0])][0].norm = module

    handles = [loss.layer.register_forward_hook(layer(loss)) for loss in losses.values()]
    kind = nn.modules.batchnorm._BatchNorm
    handles += [module.register_forward_pre_hook(norm) for module in model.modules() if isinstance(module, kind)]
    try:
        for batch in batches:
            run(model, batch)
            written.clear()
    finally:
        for handle in handles:
            handle.remove()
