"""Plain round to nearest and GPTQ as Octavo has them, without its allocator, steps or coder: the textbook baseline."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peers.base import Compressed, Task, grid_bits, linears

PACKAGES: list[str] = []
PACKAGE = "octavo"

#: Added to the moment's diagonal, as a share of its mean: GPTQ's own.
DAMPING = 0.01


def settings(model: str) -> dict[str, dict[str, Any]]:
    """Both methods at 4, 3 and 2 bits in groups of 64."""
    return {
        f"{name.upper()} {bits}-bit g64": {"method": name, "bits": bits}
        for name in ("rtn", "gptq")
        for bits in (4, 3, 2)
    }


def compress(task: Task, method: str, bits: int) -> Compressed:
    """Round the linear layers."""
    from octavo.calibration.evidence import Evidence
    from octavo.methods import get_method

    model = task.load()
    layers = linears(model)
    moments = _moments(model, layers, task) if method == "gptq" else {}
    made = Compressed()
    for name, layer in layers.items():
        weight = layer.weight.detach()
        evidence = Evidence(torch.ones(len(weight)), moments.get(name))
        form = get_method(method).encode(weight, {"bits": bits, "group": 64}, evidence)
        made.add(f"{name}.weight", form.dense(), grid_bits(weight.shape, bits, 64, bits))
    return made


def _moments(model: torch.nn.Module, layers: dict[str, Any], task: Task) -> dict[str, Tensor]:
    """Damped second moments of the inputs of every layer, (columns, columns)."""
    moments = {name: torch.zeros(layer.in_features, layer.in_features) for name, layer in layers.items()}

    def watch(name: str) -> Any:
        def hook(_: Any, args: tuple[Tensor, ...]) -> None:
            flat = args[0].reshape(-1, args[0].shape[-1])
            moments[name].addmm_(flat.t(), flat)

        return hook

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    with torch.inference_mode():
        for sequence in task.sequences():
            model(**sequence)
    for hook in hooks:
        hook.remove()
    for moment in moments.values():
        moment.diagonal().add_(DAMPING * moment.diagonal().mean() + 1e-8)
    return moments
