"""Where a model reads its units: the layers whose inputs are theirs, and gates in front of them.

A unit's slice along the input dimension of a linear layer or convolution says which of its input features are the
unit's. So what a unit does can be watched, scaled and differentiated there, in any architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from octavo.cuts.base import Units
from octavo.sources.batches import Batch, mask_of

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class UnitReader:
    """A layer that reads units.

    Parameters
    ----------
    name
        The name of its weight.
    module
        The layer.
    axis
        The axis of its input that holds features.
    places
        (units, features of each) indices along that axis.
    """

    name: str
    module: nn.Module
    axis: int
    places: Tensor

    def owners(self, features: int) -> Tensor:
        """(features,) number of the unit that each input feature belongs to; the number of units where to none.

        They are where the places are.
        """
        (count, each), device = self.places.shape, self.places.device
        owners = torch.full((features,), count, device=device)
        owners[self.places.flatten()] = torch.arange(count, device=device).repeat_interleave(each)
        return owners

    def written(self, rows: Tensor) -> Tensor:
        """What a matrix makes of inputs (positions, inputs), without its bias."""
        weight: Any = self.module.weight
        return rows @ (weight.t() if isinstance(self.module, nn.Linear) else weight).to(rows)


def readers_of(model: nn.Module, part: Units) -> list[UnitReader]:
    """The layers that read some units, in the order of their slices."""
    found = []
    for piece in part.slices:
        path, _, leaf = piece.tensor.rpartition(".")
        module: Any = model.get_submodule(path)
        if leaf != "weight":
            continue
        if (isinstance(module, nn.Linear), piece.dim) == (True, 1) or (type(module).__name__, piece.dim) == (
            "Conv1D",
            0,
        ):
            found.append(UnitReader(piece.tensor, module, -1, piece.places))
        elif isinstance(module, _CONVOLUTIONS) and piece.dim == 1 and module.groups == 1:
            found.append(UnitReader(piece.tensor, module, 1, piece.places))
    return found


def positions(flow: Tensor, axis: int, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """What a layer reads as (examples, positions, features), and which positions are not padding, if any are."""
    flat = flow.movedim(axis, -1)
    flat = flat.reshape(len(flat), -1, flat.shape[-1])
    mask = mask_of(batch)
    return flat, mask.bool() if mask is not None and mask.shape == flat.shape[:2] else None


@contextmanager
def watched(modules: dict[str, nn.Module], seen: Callable[[str, Tensor], None]) -> Iterator[None]:
    """A context in which a function gets what modules read, by the names given to them."""

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args: seen(name, args[0].detach())

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def layers_watched(model: nn.Module, part: Units, seen: Callable[[int, Tensor, Tensor], Any]) -> Iterator[None]:
    """A context in which a function gets number, input and output of layers; what it returns takes the output's place.

    Parameters
    ----------
    part
        Units that are layers.
    """
    layers: Any = model.get_submodule(part.name.rpartition(":")[0])

    def hook(number: int) -> Callable[..., Any]:
        def act(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            changed = seen(number, before, after)
            if changed is None:
                return None
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return act

    handles = [layer.register_forward_hook(hook(n), with_kwargs=True) for n, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def gated(model: nn.Module, units: Sequence[Units], gates: dict[str, Tensor]) -> Iterator[None]:
    """A context in which every unit is scaled by a gate wherever it is read; a layer's gate scales what it adds.

    Parameters
    ----------
    gates
        (examples, units) by the name of units. They act on the device and in the dtype of what they scale.
    """
    with ExitStack() as hooks:
        for part in units:
            if part.wholes:
                hooks.enter_context(layers_watched(model, part, _adding(gates[part.name])))
            for reader in readers_of(model, part):
                handle = reader.module.register_forward_pre_hook(_scaling(reader, gates[part.name]))
                hooks.callback(handle.remove)
        yield


def _scaling(reader: UnitReader, gate: Tensor) -> Callable[..., Any]:
    def act(module: nn.Module, args: tuple[Any, ...]) -> Any:
        flow = args[0].movedim(reader.axis, -1)
        own, owners = gate.to(flow), reader.owners(flow.shape[-1]).to(flow.device)
        factors = torch.cat([own, torch.ones_like(own[:, :1])], 1)[:, owners]
        # A module may fold examples and positions into one dimension.
        factors = factors.repeat_interleave(len(flow) // len(factors), 0)
        scaled = flow * factors.reshape(len(flow), *[1] * (flow.ndim - 2), -1)
        return (scaled.movedim(-1, reader.axis), *args[1:])

    return act


def _adding(gate: Tensor) -> Callable[[int, Tensor, Tensor], Tensor]:
    def seen(number: int, before: Tensor, after: Tensor) -> Tensor:
        share = gate[:, number].to(after).reshape(-1, *[1] * (after.ndim - 1))
        return before + share * (after - before)

    return seen
