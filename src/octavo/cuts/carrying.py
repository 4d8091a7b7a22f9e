"""Channels whose scale is near zero are nearly constant: what reads them takes their mean into its bias."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from octavo.cuts.base import Units, check_kept
from octavo.cuts.readers import readers_of
from octavo.errors import RequestError
from octavo.sources.batches import Batch, run


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

    ``W x`` loses ``W[:, gone] E[x[gone]]``, summed over the kernel. That is added to the layer's bias, or taken from
    the running mean of the batch normalization behind it. Without either the layer stays as it is. It is exact for
    channels that are constant, such as those of scale zero, apart from the borders of padded images.

    Parameters
    ----------
    kept
        (count,) bools by the units' name.
    batches
        Inputs from which the means are taken.

    Raises
    ------
    RequestError
        If ``kept`` does not fit the units, or there are no batches.
    """
    check_kept(units, kept)
    moved: Any = copy.deepcopy(model).eval()
    gone = {}
    for part in units:
        for reader in readers_of(moved, part) if part.name in kept else ():
            path = reader.name.rpartition(".")[0]
            mask = gone.setdefault(path, (reader.module, reader.axis, []))[2]
            mask += reader.places[~kept[part.name].cpu()].flatten().tolist()
    seen = _observe(moved, {path: (module, axis) for path, (module, axis, _) in gone.items()}, batches)
    for path, (module, _, places) in gone.items():
        if not places:
            continue
        mean, norm = seen[path]
        weight = module.weight.flatten(2).sum(2) if module.weight.ndim > 2 else module.weight
        if type(module).__name__ == "Conv1D":
            weight = weight.t()
        lost = weight[:, places] @ mean[places].to(weight)
        if module.bias is not None:
            module.bias += lost
        elif norm is not None:
            norm.running_mean -= lost
    return moved.train(model.training)


Read = tuple[Tensor, nn.Module | None]


def _observe(model: nn.Module, layers: Mapping[str, tuple[Any, int]], batches: Iterable[Batch]) -> dict[str, Read]:
    """The mean of every feature that layers read, and the batch normalization that reads their output."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    behind: dict[str, nn.Module] = {}
    written: dict[int, tuple[str, Tensor]] = {}

    def layer(path: str, axis: int) -> Any:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            rows = args[0].detach().movedim(axis, -1).flatten(0, -2)
            sums[path] = sums.get(path, 0) + rows.double().sum(0)
            counts[path] = counts.get(path, 0) + len(rows)
            # The tensor is held, so that no other gets its number.
            written[id(output)] = (path, output)

        return hook

    def norm(module: nn.Module, args: tuple) -> None:
        if id(args[0]) in written:
            behind[written[id(args[0])][0]] = module

    handles = [module.register_forward_hook(layer(path, axis)) for path, (module, axis) in layers.items()]
    kind = nn.modules.batchnorm._BatchNorm
    handles += [module.register_forward_pre_hook(norm) for module in model.modules() if isinstance(module, kind)]
    try:
        for batch in batches:
            run(model, batch)
            written.clear()
    finally:
        for handle in handles:
            handle.remove()
    if missing := [path for path in layers if path not in counts]:
        raise RequestError(f"carry: {missing[0]!r} did not run, so its inputs have no mean; give batches that reach it")
    return {path: (sums[path] / counts[path], behind.get(path)) for path in layers}
