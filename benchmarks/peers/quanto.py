"""optimum-quanto: weight-only formats of Hugging Face."""

from __future__ import annotations

from typing import Any

from peers.base import Compressed, Task, convolutions, grid_bits, linears

PACKAGES = ["optimum-quanto==0.2.7"]


def settings(model: str) -> dict[str, dict[str, Any]]:
    """8 and 4 bits, and 4 with its HQQ optimizer; its 2 bits leave nothing of any of these models."""
    found: dict[str, dict[str, Any]] = {f"qint{bits}": {"bits": bits} for bits in (8, 4)}
    return found | {"qint4 HQQ optimizer": {"bits": 4, "hqq": True}}


def compress(task: Task, bits: int, hqq: bool = False) -> Compressed:
    """Quantize and freeze the linear layers and the convolutions."""
    from optimum import quanto
    from optimum.quanto.tensor.optimizers import HqqOptimizer

    model = task.load()
    layers = linears(model) | convolutions(model)
    # The tool takes the weights out of the layers.
    shapes = {name: layer.weight.shape for name, layer in layers.items()}
    quanto.quantize(
        model,
        weights=getattr(quanto, f"qint{bits}"),
        include=list(layers),
        optimizer=HqqOptimizer() if hqq else None,
    )
    quanto.freeze(model)
    made = Compressed(runtime=lambda batch: model(**batch))
    for name, shape in shapes.items():
        weight = model.get_submodule(name).weight
        if bits == 8:
            cost = grid_bits(shape, 8, shape[1:].numel())
        else:
            group = weight._group_size or shape[1:].numel()
            # Scales and offsets are one each a group; the offset is floating with HQQ, else as wide as a code.
            cost = grid_bits(shape, bits, group, 16 if weight._shift.is_floating_point() else bits)
        made.add(f"{name}.weight", weight.dequantize().reshape(shape), cost)
    return made
