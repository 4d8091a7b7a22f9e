"""NNCF with OpenVINO: weights compressed in an OpenVINO model, which then runs with OpenVINO's kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peers.base import Compressed, Task

PACKAGES = ["nncf==3.4.0", "openvino==2026.4.1"]


def settings(model: str) -> dict[str, dict[str, Any]]:
    """8 bits; 4 bits in all layers and with 8-bit embeddings, as it does by default, with its helpers for accuracy; 3 bits."""
    gptq = {"gptq": True, "scale_estimation": True}
    return {
        "int8_asym": {"mode": "INT8_ASYM"},
        "int4_asym g64 GPTQ+scale_estimation all layers": {"mode": "INT4_ASYM", "all_layers": True, **gptq},
        "int4_asym g64 GPTQ+scale_estimation": {"mode": "INT4_ASYM", **gptq},
        "int3_sym g64 GPTQ+scale_estimation": {"mode": "INT3_SYM", **gptq},
    }


def compress(task: Task, mode: str, **options: Any) -> Compressed:
    """Convert, compress, and read the weights back from the graph."""
    import nncf
    import openvino

    model = task.load()
    graph = _convert(task, model)
    uses = _uses(graph, model)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    if not mode.startswith("INT8"):
        options["group_size"] = 64
        if options.keys() & {"gptq", "awq", "scale_estimation"}:
            names = [port.any_name for port in graph.inputs]
            rows = [{name: sequence[name].numpy() for name in names} for sequence in task.sequences()]
            options |= {"dataset": nncf.Dataset(rows), "subset_size": len(rows)}
    graph = nncf.compress_weights(graph, mode=getattr(nncf.CompressWeightsMode, mode), **options)
    made = Compressed()
    nodes = {node.friendly_name: node for node in graph.get_ops()}
    for name, use in uses.items():
        value = nodes[use.node].input_value(use.port)
        constants = _constants(value.get_node())
        bits = sum(constant.get_element_type().bitwidth * int(np.prod(constant.shape)) for constant in constants)
        if len(constants) > 1:
            weight = _evaluate(value).flatten(1) / use.factors[:, None]
            made.add(name, weight.reshape(shapes[name]), bits)
    compiled = openvino.compile_model(
        graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    )
    names = [port.any_name for port in graph.inputs]
    made.runtime = lambda batch: compiled({name: batch[name].numpy() for name in names})
    return made


class _Tensors(nn.Module):
    """A model that returns one tensor, and takes tensors by their place, which is what the converter can follow."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        made = self.model(**dict(zip(self.names, tensors, strict=True)))
        return made if isinstance(made, Tensor) else made.last_hidden_state if "logits" not in made else made.logits


def _convert(task: Task, model: nn.Module) -> Any:
    """The model as an OpenVINO graph, for any number of tokens; its inputs bear the names of the model's."""
    import openvino

    example = task.sequences()[0]
    # A language model is exported without its mask, which single sequences do not need; the others are traced.
    names = ["input_ids"] if task.language else [name for name in example if not name.startswith("decoder_attention")]
    wrapped, inputs = _Tensors(model, names), tuple(example[name] for name in names)
    if task.language:
        tokens = torch.export.Dim("tokens", min=2, max=512)
        exported = torch.export.export(wrapped, inputs, dynamic_shapes={"tensors": ({1: tokens},)}, strict=False)
        graph = openvino.convert_model(exported)
    else:
        graph = openvino.convert_model(wrapped, example_input=inputs)
    for port, name in zip(graph.inputs, names, strict=True):
        port.set_names({name})
    return graph


@dataclass(frozen=True)
class _Use:
    """Where a weight enters the graph: the node's name and its port; and by what its rows were multiplied, (rows,)."""

    node: str
    port: int
    factors: Tensor


def _uses(graph: Any, model: nn.Module) -> dict[str, _Use]:
    """Uses of every matrix and convolution of the model by name. The graph keeps no names, and folds norms into convolutions."""
    weights = {name: tensor.detach().flatten(1) for name, tensor in model.named_parameters() if tensor.ndim > 1}
    uses: dict[str, _Use] = {}
    for node in graph.get_ops():
        if node.get_type_name() != "Constant" or len(node.shape) < 2:
            continue
        value = torch.from_numpy(np.array(node.data, dtype=np.float32)).flatten(1)
        for name, weight in weights.items():
            if name not in uses and weight.shape == value.shape:
                factors = (value * weight).sum(1) / weight.square().sum(1)
                factors = torch.where(factors.isfinite() & (factors != 0), factors, 1)
                if torch.allclose(factors[:, None] * weight, value, rtol=1e-4, atol=1e-5 * float(value.abs().max())):
                    for target in node.output(0).get_target_inputs():
                        uses[name] = _Use(target.get_node().friendly_name, target.get_index(), factors)
                    break
    return uses


def _constants(node: Any) -> list[Any]:
    """All constants that a node is computed from, without the shapes of reshapes."""
    if node.get_type_name() == "Constant":
        return [node]
    inputs = node.input_values()[:1] if node.get_type_name() == "Reshape" else node.input_values()
    return [constant for value in inputs for constant in _constants(value.get_node())]


def _evaluate(output: Any) -> Tensor:
    """The value of a part of a graph that has no inputs."""
    import openvino

    part = openvino.compile_model(openvino.Model([output], []), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(np.array(part([])[0], dtype=np.float32))
