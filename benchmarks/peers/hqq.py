"""HQQ: half-quadratic fitting of zero points, without calibration."""

from __future__ import annotations

from typing import Any

import torch

from peers.base import Compressed, Task, grid_bits, linears

PACKAGES = ["hqq==0.2.8.post1"]


def settings(model: str) -> dict[str, dict[str, Any]]:
    """Its own group of 64, along axis 0, which its README calls the better."""
    return {f"{bits}-bit g64 axis 0": {"bits": bits, "axis": 0} for bits in (8, 4, 3)}


def compress(task: Task, bits: int, axis: int) -> Compressed:
    """Replace the linear layers; scales and zero points are float16, as it keeps them for float16 models."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    from hqq.models.hf.base import AutoHQQHFModel

    model = task.load()
    shapes = {name: layer.weight.shape for name, layer in linears(model).items()}
    config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
    if not task.language:
        # Its loop over a model knows language models only, and its layer is a linear one.
        for name in shapes:
            layer = HQQLinear(model.get_submodule(name), config, compute_dtype=torch.float32, device="cpu")
            model.set_submodule(name, layer)
    else:
        AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.float32, device="cpu")
    made = Compressed(runtime=lambda batch: model(**batch))
    for name, shape in shapes.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, HQQLinear), name
        made.add(f"{name}.weight", layer.dequantize().reshape(shape), grid_bits(shape, bits, 64, 16))
    return made
