"""torchao: PyTorch's own weight-only formats."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peers.base import Compressed, Task, grid_bits, linears

PACKAGES = ["torchao==0.18.0"]


def settings(model: str) -> dict[str, dict[str, Any]]:
    """Its 8-bit format, its formats of fewer bits with scales fitted by HQQ, its CPU kernel."""
    found: dict[str, dict[str, Any]] = {"int8 weight-only": {"kind": "int8", "bits": 8}}
    found["int4 CPU kernel g64 bf16"] = {"kind": "int4", "bits": 4}
    found["intx 4-bit g64 asymmetric"] = {"kind": "intx asymmetric", "bits": 4}
    return found | {f"intx {bits}-bit g64 HQQ scales": {"kind": "intx hqq", "bits": bits} for bits in (4, 3, 2)}


def compress(task: Task, kind: str, bits: int) -> Compressed:
    """Quantize the linear layers, which alone its weight-only formats take; codes that it keeps in bytes are counted at their nominal bits."""
    from torchao.quantization import quantize_

    model = task.load(**({"dtype": torch.bfloat16} if kind == "int4" else {}))
    layers = linears(model)
    wanted = set(layers.values())
    quantize_(model, _config(kind, bits), filter_fn=lambda module, name: module in wanted)
    made = Compressed(runtime=lambda batch: model(**batch))
    for name, layer in layers.items():
        columns = layer.weight.shape[1]
        # The CPU kernel's zero points are floating.
        group, zero = columns if kind == "int8" else 64, {"int4": 16, "intx asymmetric": bits}.get(kind, 0)
        made.add(f"{name}.weight", _dense(layer, kind), grid_bits(layer.weight.shape, bits, group, zero))
    return made


def _config(kind: str, bits: int) -> Any:
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
    from torchao.quantization.quant_primitives import MappingType

    if kind == "int8":
        return Int8WeightOnlyConfig()
    if kind == "int4":
        return PrototypeInt4WeightOnlyConfig(group_size=64)
    fitted = {"mapping_type": MappingType.ASYMMETRIC}
    if kind == "intx hqq":
        fitted = {"intx_choose_qparams_algorithm": "hqq_scale_only"}
    return IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(64), **fitted)


def _dense(layer: nn.Module, kind: str) -> torch.Tensor:
    """The weight that the layer stands for; the kernel's packed format is read by multiplying with the identity."""
    if kind != "int4":
        return layer.weight.dequantize()
    plain = nn.functional.linear(torch.eye(layer.in_features, dtype=torch.bfloat16), layer.weight)
    return plain.t()
