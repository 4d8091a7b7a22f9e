"""The neurons and channels of plain chains of layers as units."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from octavo.cuts.base import Slice, Units
from octavo.errors import RequestError

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def chain_units(model: nn.Module) -> list[Units]:
    """What every layer of a chain but the last writes, with the layer that reads it.

    Between two layers there may be batch norms, and modules without parameters that treat channels apart, such as
    rectifiers, pooling and ``nn.Flatten``.

    Parameters
    ----------
    model
        An ``nn.Sequential``, whose parts may be such chains too.

    Raises
    ------
    RequestError
        If the model is no such chain.

    Examples
    --------
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> [(part.name, part.kind, part.count, tuple(part.slices[-1].places.shape)) for part in chain_units(net)]
    [('0', 'channel', 4, (4, 36)), ('2', 'neuron', 8, (8, 1))]
    """
    units: list[Units] = []
    writer: tuple[str, str, int] | None = None
    slices: list[Slice] = []
    for name, module in _links(model, ""):
        if isinstance(module, _NORMS) and writer is not None:
            slices += _slices(model, name, _places(name, module.num_features, writer))
        elif isinstance(module, _LAYERS) and getattr(module, "groups", 1) == 1:
            inputs, outputs = module.weight.shape[1], len(module.weight)
            if writer is not None:
                reads = Slice(f"{name}.weight", 1, _places(name, inputs, writer))
                units.append(Units(*writer, (*slices, reads)))
            writer = name, "neuron" if isinstance(module, nn.Linear) else "channel", outputs
            slices = _slices(model, name, torch.arange(outputs)[:, None])
        elif isinstance(module, nn.ChannelShuffle) or next(module.parameters(), None) is not None:
            raise RequestError(
                f"{type(model).__name__}: {name!r} ({type(module).__name__}) is not a link of a plain chain; give an "
                "nn.Sequential of linear layers and convolutions, or list the units"
            )
    if not units:
        raise RequestError(f"{type(model).__name__}: has no two layers in a row, and so no units; give a longer chain")
    return units


def _links(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a chain, first to last."""
    if not isinstance(module, nn.Sequential):
        yield name, module
        return
    for leaf, part in module.named_children():
        yield from _links(part, f"{name}.{leaf}".lstrip("."))


def _places(name: str, features: int, writer: tuple[str, str, int]) -> Tensor:
    """(count, features of each) of what a layer wrote; ``nn.Flatten`` gives each channel several in a row."""
    before, kind, count = writer
    if features % count:
        raise RequestError(
            f"{name!r}: its {features} features are not the same number for each of the {count} {kind}s of {before!r}, "
            "so what lies between mixes them, as nn.GLU does; list the units"
        )
    return torch.arange(features).view(count, -1)


def _slices(model: nn.Module, name: str, places: Tensor) -> list[Slice]:
    """The first dimensions of all tensors of a layer or norm."""
    own = model.get_submodule(name).state_dict()
    return [Slice(f"{name}.{leaf}", 0, places) for leaf, tensor in own.items() if tensor.ndim]
