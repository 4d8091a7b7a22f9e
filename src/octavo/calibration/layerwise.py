"""What linear layers read: second moments of their inputs, at once or through the layers changed before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from octavo.calibration.blocks import Blocks
from octavo.calibration.objective import Objective
from octavo.errors import RequestError
from octavo.sources.batches import Batch, mask_of
from octavo.system.matmul import fast_matmul, gram


@contextmanager
def input_moments(layers: Mapping[str, nn.Module], batches: Sequence[Batch]) -> Iterator[dict[str, Tensor]]:
    """Sums of ``x x^T`` over what layers read while the batches pass, one after the other and once each.

    Yields
    ------
    dict
        (inputs, inputs) in float64 by the layers' names, complete at the end of the context. Padding is left out.

    Examples
    --------
    >>> layer, batch = nn.Linear(3, 2), torch.randn(8, 3)
    >>> with input_moments({"layer": layer}, [batch]) as moments:
    ...     _ = layer(batch)
    >>> torch.allclose(moments["layer"].float(), batch.t() @ batch, atol=1e-5)
    True
    """
    moments: dict[str, Tensor] = {}
    masks = {name: iter([mask_of(batch) for batch in batches]) for name in layers}

    def add(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        mask = next(masks[name])
        flow = args[0].detach()
        flat = (flow.flatten(0, -2) if mask is None else flow[mask.bool()]).double()
        moments[name] = moments.get(name, 0) + gram(flat)

    handles = [module.register_forward_pre_hook(partial(add, name)) for name, module in layers.items()]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


@fast_matmul()
@torch.no_grad()
def change_layers(
    model: nn.Module,
    objective: Objective,
    batches: Sequence[Batch],
    changed: Callable[[str, nn.Linear, Tensor], Tensor],
    *,
    layers: int | None = None,
    in_order: bool = True,
) -> None:
    """Give every linear layer of a model's blocks another weight, first block to last, in place.

    Parameters
    ----------
    objective
        How the model is called on a batch.
    changed
        Returns the new weight of a layer by the name of its weight (``0.self_attn.q_proj.weight`` in the first block),
        the layer, and the sum of ``x x^T`` over what it reads, (inputs, inputs).
    layers
        How many blocks are changed; all by default.
    in_order
        Whether what a layer reads comes through the blocks changed before it, or through the original ones.

    Raises
    ------
    RequestError
        If the model is not a chain of blocks.
    """
    blocks = Blocks.find(model.eval())
    if blocks is None:
        raise RequestError(f"{type(model).__name__}: has no chain of blocks; change its layers one by one")
    blocks.check(objective, batches[0])
    begun = [blocks.prelude(objective, batch) for batch in batches]
    states = [state for state, _ in begun]
    for number, block in list(enumerate(blocks.list))[:layers]:

        def through(states: Sequence[Tensor], number: int = number) -> list[Tensor]:
            return [blocks.run(number, state, calls[number]) for state, (_, calls) in zip(states, begun, strict=True)]

        linears = {
            f"{number}.{name}.weight": module for name, module in block.named_modules() if isinstance(module, nn.Linear)
        }
        with input_moments(linears, batches) as moments:
            after = through(states)
        for name, layer in linears.items():
            layer.weight.copy_(changed(name, layer, moments[name]))
        states = through(states) if in_order else after
