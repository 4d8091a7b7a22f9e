"""Plain round to nearest and GPTQ as Octavo has them, without its allocator, steps or coder: the textbook baseline."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peers.base import Compressed, Task, convolutions, grid_bits, linears

PACKAGES: list[str] = []
PACKAGE = "octavo"

#: Added to the moment's diagonal, as a share of its mean: GPTQ's own.
DAMPING = 0.01


def settings(model: str) -> dict[str, dict[str, Any]]:
    """Round to nearest at 8 and 4 bits, GPTQ at 4, 3 and 2, in groups of 64."""
    tried = (("rtn", 8), ("rtn", 4), ("gptq", 4), ("gptq", 3), ("gptq", 2))
    return {f"{name.upper()} {bits}-bit g64": {"method": name, "bits": bits} for name, bits in tried}


def compress(task: Task, method: str, bits: int) -> Compressed:
    """Round the linear layers and the convolutions; GPTQ needs inputs, so what is filtered channel by channel is rounded to nearest."""
    from octavo.calibration.evidence import Evidence
    from octavo.methods import get_method

    model = task.load()
    layers = linears(model) | convolutions(model)
    moments = _moments(model, layers, task) if method == "gptq" else {}
    made = Compressed()
    for name, layer in layers.items():
        weight = layer.weight.detach().flatten(1)
        evidence = Evidence(torch.ones(len(weight)), moments.get(name))
        used = method if method == "rtn" or name in moments else "rtn"
        form = get_method(used).encode(weight, {"bits": bits, "group": 64}, evidence)
        made.add(f"{name}.weight", form.dense().reshape(layer.weight.shape), grid_bits(weight.shape, bits, 64, bits))
    return made


def _moments(model: torch.nn.Module, layers: dict[str, Any], task: Task) -> dict[str, Tensor]:
    """Damped second moments of the inputs of every layer, (columns, columns), those of grouped convolutions left out."""
    layers = {name: layer for name, layer in layers.items() if getattr(layer, "groups", 1) == 1}
    moments = {name: torch.zeros(2 * [layer.weight[0].numel()]) for name, layer in layers.items()}

    def watch(name: str, layer: Any) -> Any:
        def hook(_: Any, args: tuple[Tensor, ...]) -> None:
            flat = args[0].reshape(-1, args[0].shape[-1])
            if isinstance(layer, nn.Conv2d):
                patches = nn.functional.unfold(args[0], layer.kernel_size, layer.dilation, layer.padding, layer.stride)
                flat = patches.transpose(1, 2).flatten(0, 1)
            moments[name].addmm_(flat.t(), flat)

        return hook

    hooks = [layer.register_forward_pre_hook(watch(name, layer)) for name, layer in layers.items()]
    with torch.inference_mode():
        for sequence in task.sequences():
            model(**sequence)
    for hook in hooks:
        hook.remove()
    for moment in moments.values():
        moment.diagonal().add_(DAMPING * moment.diagonal().mean() + 1e-8)
    return moments
