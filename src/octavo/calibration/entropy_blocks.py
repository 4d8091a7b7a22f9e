"""Entropy of what layers return, and blocks of layers that it joins: what quantization should search together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import RequestError
from octavo.sources.batches import Batch, run
from octavo.system.matmul import fast_matmul
from octavo.system.modes import evaluating

#: The most layers of a block.
DEEPEST = 3


@fast_matmul()
@torch.no_grad()
def activation_entropies(model: nn.Module, layers: Sequence[str], batches: Sequence[Batch]) -> dict[str, float]:
    """Entropy of each layer's outputs over positions, by name: the mean over channels and batches.

    A channel ``x`` (positions,) has ``-sum p log p / log positions`` with ``p = |x - mean| / sum |x - mean|``. So
    neither its scale nor its offset counts, and layers with other numbers of positions compare. 1 is an even
    distribution, near 0 are few outliers. Constant channels count as 0.

    Parameters
    ----------
    model
        The model. It runs in evaluation mode, and is not changed.
    layers
        Names of modules that return (..., positions, channels), or a tuple that begins with it.
    batches
        Inputs of the model without padding, which would count as positions.

    Raises
    ------
    RequestError
        If there is no such layer, or it returns something else, or values that are not finite.

    Examples
    --------
    >>> model = nn.Sequential(nn.Identity(), nn.ReLU())
    >>> entropies = activation_entropies(model, ["0", "1"], [torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])])
    >>> round(entropies["0"], 3)
    1.0
    """
    found: dict[str, list[float]] = {name: [] for name in layers}

    def add(name: str, module: nn.Module, args: tuple, result: Any) -> None:
        states = result[0] if isinstance(result, tuple) else result
        if not isinstance(states, Tensor) or states.ndim < 2:
            raise RequestError(f"layer {name!r}: returns no (positions, channels); name layers that return states")
        found[name].append(_entropy(name, states.flatten(0, -2).float()))

    with ExitStack() as stack, evaluating(model):
        for name in layers:
            handle = layer_of(model, name).register_forward_hook(partial(add, name))
            stack.callback(handle.remove)
        for batch in batches:
            run(model, batch)
    if unused := [name for name, values in found.items() if not values]:
        raise RequestError(f"layers {unused} did not run; give at least one batch, and layers that the model calls")
    return {name: sum(values) / len(values) for name, values in found.items()}


def layer_of(model: nn.Module, name: str) -> nn.Module:
    """The module of that name.

    Raises
    ------
    RequestError
        If there is none.
    """
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise RequestError(f"{type(model).__name__}: has no layer {name!r}; see named_modules()") from error


def entropy_blocks(entropies: Mapping[str, float], *, deepest: int = DEEPEST) -> list[tuple[str, ...]]:
    """Partition a chain of layers: one whose entropy exceeds the running mean joins its successor.

    This is the rule of Q-VLM (Wang et al., 2024, arXiv 2410.08119), whose code uses a depth of three. The running mean
    is that of the layers up to and with the one that is judged.

    Parameters
    ----------
    entropies
        By the layers' names, in the order in which they run.
    deepest
        The most layers of a block.

    Raises
    ------
    RequestError
        If the depth is below one.

    Examples
    --------
    >>> entropy_blocks({"a": 0.5, "b": 0.9, "c": 0.6, "d": 0.5})
    [('a',), ('b', 'c'), ('d',)]
    """
    if deepest < 1:
        raise RequestError(f"deepest: blocks need at least one layer, not {deepest}; choose 1 or more")
    blocks: list[tuple[str, ...]] = []
    total, joins = 0.0, False
    for number, (name, entropy) in enumerate(entropies.items(), 1):
        if joins and len(blocks[-1]) < deepest:
            blocks[-1] += (name,)
        else:
            blocks.append((name,))
        total += entropy
        joins = entropy > total / number
    return blocks


def _entropy(name: str, states: Tensor) -> float:
    """Normalised entropy of states (positions, channels)."""
    if not bool(torch.isfinite(states).all()):
        raise RequestError(f"layer {name!r}: returns values that are not finite; choose other batches")
    size = (states - states.mean(0)).abs()
    share = size / size.sum(0).clamp_min(torch.finfo(torch.float32).tiny)
    most = torch.tensor(float(max(len(states), 2))).log()
    return float((torch.special.entr(share).sum(0) / most).mean())
