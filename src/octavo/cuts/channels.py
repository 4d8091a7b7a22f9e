"""Channels of convolutional networks as units, through the dependency graph of ``torch-pruning``.

A channel is written by a convolution, scaled by norms, and read by others; a residual connection makes several
convolutions share theirs. The graph is traced from a run on an example. Here it only says what belongs together: each
group is tried out, and those are units whose removal leaves the model running with outputs of the same shape.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from octavo.cuts.base import Slice, Units
from octavo.cuts.surgery import without
from octavo.errors import MissingExtraError, OctavoError, RequestError
from octavo.sources.batches import Batch, copied, described, run, select, sequences_in

CHANNEL = "channel"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: Examples that the graph is traced with: batch normalization needs no more in evaluation.
_TRACED = 2


def channel_units(model: nn.Module, example: Batch) -> list[Units]:
    """The groups of channels of a model; none if it has no convolution.

    Parameters
    ----------
    model
        The model; it is not changed.
    example
        A batch that it takes.

    Raises
    ------
    MissingExtraError
        If ``torch-pruning`` is not installed.
    RequestError
        If there is no example, or the graph cannot be traced.
    """
    if not any(isinstance(module, _CONVOLUTIONS) for module in model.modules()):
        return []
    if isinstance(example, str):
        raise RequestError(
            f"{type(model).__name__}: channels are traced with an example; give a batch, as in "
            "Structured(example=images)"
        )
    if sequences_in(example) > _TRACED:
        example = select(example, slice(0, _TRACED))
    traced = copy.deepcopy(model).eval().requires_grad_(True)
    names = {module: name for name, module in traced.named_modules()}
    units = []
    for group in _groups(traced, example):
        root = names[group[0].dep.target.module]
        slices = _slices(names, group)
        if slices:
            count = len(slices[0].places)
            part = Units(f"{root}:{CHANNEL}", CHANNEL, count, tuple(slices))
            if count > 1 and _runs_without(traced, part, example):
                units.append(part)
    return units


def _groups(model: nn.Module, example: Batch) -> list[Any]:
    """All groups of layers that share their channels."""
    try:
        import torch_pruning
    except ImportError as error:
        raise MissingExtraError(
            f"channels are found by torch-pruning, which cannot be imported ({error}): pip install 'octavo[prune]'"
        ) from error
    try:
        with torch.enable_grad():
            graph = torch_pruning.DependencyGraph().build_dependency(
                model, copied(example), forward_fn=run, output_transform=_tensors, verbose=False
            )
        return list(graph.get_all_groups(root_module_types=list(_CONVOLUTIONS)))
    except OctavoError:
        raise
    except Exception as error:
        # The tracer meets any module that a user has written.
        raise RequestError(
            f"{type(model).__name__}: its channels cannot be traced on a batch of {described(example)} "
            f"({type(error).__name__}: {error}); cut it by hand with octavo.cuts.without"
        ) from error


def _slices(names: dict[nn.Module, str], group: Any) -> list[Slice]:
    """Where each channel of a group lies in all tensors; none if a module in it cannot be cut."""
    found: dict[tuple[str, int], Tensor] = {}
    for item in group:
        module = item.dep.target.module
        if module not in names:
            # An operation without tensors, or a parameter of its own, which is not followed here.
            if isinstance(module, nn.Parameter):
                return []
            continue
        leaves_and_dims = _hanging(module, writes="out" in item.dep.handler.__name__)
        places = _places(item.idxs, item.root_idxs)
        if leaves_and_dims is None or places is None:
            return []
        for leaf, dim in leaves_and_dims:
            key = (f"{names[module]}.{leaf}".lstrip("."), dim)
            if key in found and not torch.equal(found[key], places):
                return []
            found[key] = places
    return [Slice(name, dim, places) for (name, dim), places in found.items()]


def _hanging(module: nn.Module, *, writes: bool) -> list[tuple[str, int]] | None:
    """The tensors of a layer that have one slice for each channel that it writes or reads; None if it is not known."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return [(leaf, 0) for leaf in ("weight", "bias", "running_mean", "running_var") if _held(module, leaf)]
    if not isinstance(module, (*_CONVOLUTIONS, nn.Linear)):
        return None if next(module.parameters(), None) is not None else []
    if not writes and getattr(module, "groups", 1) == 1:
        return [("weight", 1)]
    return [(leaf, 0) for leaf in ("weight", "bias") if _held(module, leaf)]


def _held(module: nn.Module, leaf: str) -> bool:
    return module._parameters.get(leaf, module._buffers.get(leaf)) is not None


def _places(places: Sequence[int], roots: Sequence[int]) -> Tensor | None:
    """(channels, places of each); None if channels have unequal numbers of them."""
    channels: dict[int, list[int]] = {}
    for place, root in zip(places, roots, strict=True):
        channels.setdefault(root, []).append(place)
    rows = [channels.get(number, []) for number in range(len(channels))]
    return torch.tensor(rows) if len({len(row) for row in rows}) == 1 and rows[0] else None


@torch.no_grad()
def _runs_without(model: nn.Module, part: Units, example: Batch) -> bool:
    """Whether a model runs without the first unit, and its outputs keep their shapes."""
    kept = {part.name: torch.arange(part.count) > 0}
    try:
        shapes = [
            [tuple(tensor.shape) for tensor in _tensors(run(one, example))]
            for one in (model, without(model, [part], kept))
        ]
    except OctavoError:
        return False
    return shapes[0] == shapes[1]


def _tensors(result: Any) -> list[Tensor]:
    """The tensors in what a model returns."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, dict):
        return [tensor for value in result.values() for tensor in _tensors(value)]
    return [tensor for value in result for tensor in _tensors(value)] if isinstance(result, list | tuple) else []
