"""The smallest file: every matrix and table in the smallest exact storage for its form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from octavo.forms import Form
from octavo.runtimes.onnx.filling import filled
from octavo.runtimes.onnx.graph import LOOKUP, WEIGHT, is_placeholder
from octavo.runtimes.onnx.kernels import FLOAT
from octavo.runtimes.onnx.nodes import Nodes
from octavo.runtimes.onnx.weights import narrow, product, weight

#: Other float tensors are optimised from this number of elements.
_FEW = 128


def lower_small(model: Any, forms: Mapping[str, Form], dtypes: Mapping[str, torch.dtype]) -> Any:
    """A copy of a traced graph in which sites are decoded from initializers of few bits and run in float32.

    Parameters
    ----------
    model
        The result of :func:`octavo.runtimes.onnx.graph.trace`; it is not changed.
    forms
        The form of every site in the graph.
    dtypes
        The dtypes to which decoded weights are rounded, if not float32.

    Raises
    ------
    RequestError
        If the file would be too large.
    """

    def place(nodes: Nodes, node: Any) -> str:
        form, dtype = forms[node.name], dtypes.get(node.name, torch.float32)
        if node.op_type == LOOKUP:
            return weight(nodes, node.name, form, dtype, node.input[0])
        if node.op_type == WEIGHT:
            return weight(nodes, node.name, form, dtype)
        return product(nodes, node.name, node.input[0], form, dtype)

    return filled(model, place, {node.name: FLOAT for node in model.graph.node if is_placeholder(node)}, _narrowed)


def _narrowed(nodes: Nodes, tensor: Any) -> None:
    """Add an initializer, in 16 bits if they hold it exactly."""
    import onnx

    if tensor.data_type == onnx.TensorProto.FLOAT:
        values = torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
        stored = narrow(values)
        if values.numel() >= _FEW and stored.dtype != torch.float32:
            found = nodes.cast(nodes.constant(f"{tensor.name}/stored", stored), torch.float32)
            nodes.add("Identity", [found], outputs=[tensor.name])
            return
    nodes.initializers.append(tensor)


def packed_bytes(form: Form) -> int:
    """Bytes of a form's parts, with integers in the narrowest of 4, 8, 16 or 32 bits and floats as stored."""
    return sum(_packed(part) for part in form.tensors().values())


def _packed(part: Tensor) -> int:
    if part.dtype.is_floating_point or not part.numel():
        return part.nbytes
    low, high = (int(value) for value in torch.aminmax(part))
    bits = next((bits for bits in (4, 8, 16) if high - low < 2**bits), 32)
    return -(-part.numel() * bits // 8)
