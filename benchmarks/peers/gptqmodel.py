"""GPTQModel: GPTQ, packed for its own kernels."""

from __future__ import annotations

import os
from typing import Any

from peers.base import Compressed, Task, grid_bits

PACKAGES = ["GPTQModel==7.6.0"]
#: Models that it was tried on in vain.
UNKNOWN = ("minilm", "whisper", "lite0")


def settings(model: str) -> dict[str, dict[str, Any]]:
    """4 and 3 bits in groups of 64, asymmetric, which is the better of its two kinds; one of a model that it has no class for."""
    return {
        f"GPTQ {bits}-bit g64 asym": {"bits": bits, "symmetric": False}
        for bits in ((4,) if model in UNKNOWN else (4, 3))
    }


def compress(task: Task, bits: int, symmetric: bool = True) -> Compressed:
    """Quantize, save, load, and read what its layers stand for."""
    # Its pool of workers is refused on a machine of two cores unless it is told.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    config = QuantizeConfig(bits=bits, group_size=64, sym=symmetric)
    model = GPTQModel.load(str(task.folder), config, device="cpu")
    model.quantize(
        [{name: tensor[0] for name, tensor in sequence.items()} for sequence in task.sequences()], batch_size=1
    )
    model.save(str(task.scratch))
    loaded = GPTQModel.load(str(task.scratch), device="cpu").model
    made = Compressed(runtime=lambda batch: loaded(**batch))
    for name, layer in loaded.named_modules():
        if isinstance(layer, BaseQuantLinear):
            weight = layer.dequantize_weight().t()
            # Zero points are stored for symmetric grids as well, but need not be.
            made.add(f"{name}.weight", weight, grid_bits(weight.shape, bits, 64, 0 if symmetric else bits))
    return made
