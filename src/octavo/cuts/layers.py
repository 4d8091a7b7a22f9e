"""Whole layers as units: those that stay close ranks, and their tensors get other names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from octavo.cuts.base import Units

#: The kind of units that are layers; their name is the path of the list that holds them, and a colon.
LAYER = "layer"


def layer_units(model: nn.Module, path: str) -> Units:
    """The layers in the ``nn.ModuleList`` at a path, as units that go as a whole."""
    layers: Any = model.get_submodule(path)
    names = tuple(
        tuple(f"{path}.{number}.{name}" for name in layer.state_dict(keep_vars=True))
        for number, layer in enumerate(layers)
    )
    return Units(f"{path}:{LAYER}", LAYER, len(layers), (), wholes=names)


def dropped(units: Sequence[Units], kept: Mapping[str, Tensor]) -> set[str]:
    """Names of all tensors of the layers that are not kept."""
    return {
        name
        for part in units
        if part.wholes and part.name in kept
        for stays, names in zip(kept[part.name].tolist(), part.wholes, strict=True)
        if not stays
        for name in names
    }


def drop_layers(model: nn.Module, units: Sequence[Units], kept: Mapping[str, Tensor]) -> None:
    """Take the layers that are not kept out of their lists, in place; the others know their new numbers."""
    for path, stays in _lists(units, kept):
        layers: Any = model.get_submodule(path)
        owner, _, leaf = path.rpartition(".")
        left = nn.ModuleList(layer for layer, stay in zip(layers, stays, strict=True) if stay)
        setattr(model.get_submodule(owner), leaf, left)
        for number, layer in enumerate(left):
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    module.__dict__["layer_idx"] = number


def renumbered(units: Sequence[Units], kept: Mapping[str, Tensor], name: str) -> str | None:
    """The name of a tensor after layers were dropped; None if it went with one.

    Examples
    --------
    >>> import torch
    >>> layers = Units("h:layer", "layer", 3, (), wholes=(("h.0.w",), ("h.1.w",), ("h.2.w",)))
    >>> kept = {"h:layer": torch.tensor([True, False, True])}
    >>> [renumbered([layers], kept, name) for name in ("wte", "h.1.w", "h.2.w")]
    ['wte', None, 'h.1.w']
    """
    for path, stays in _lists(units, kept):
        if name.startswith(f"{path}."):
            number, _, rest = name.removeprefix(f"{path}.").partition(".")
            return f"{path}.{sum(stays[: int(number)])}.{rest}" if stays[int(number)] else None
    return name


def _lists(units: Sequence[Units], kept: Mapping[str, Tensor]) -> Iterator[tuple[str, list[bool]]]:
    """The path of every list that loses layers, and which of them stay."""
    for part in units:
        if part.wholes and part.name in kept and not bool(kept[part.name].all()):
            yield part.name.rpartition(":")[0], kept[part.name].tolist()
