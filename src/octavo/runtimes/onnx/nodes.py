"""Building the nodes and initializers of an ONNX graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from octavo.system.raw import raw_bytes

T = TypeVar("T")
MICROSOFT = "com.microsoft"
_IR = 10
#: Type numbers of ``onnx.TensorProto`` for the torch dtypes of initializers.
TYPES = {
    torch.float32: 1, torch.uint8: 2, torch.int8: 3, torch.uint16: 4, torch.int16: 5, torch.int32: 6, torch.int64: 7,
    torch.float16: 10, torch.bfloat16: 16,
}  # fmt: skip
UINT4 = 21


class Nodes:
    """Nodes and initializers with unique names."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._names = set(taken)
        self._shared: dict[Hashable, Any] = {}

    def add_node(self, node: Any) -> None:
        """Append an existing node unchanged."""
        self.nodes.append(node)

    def add(
        self,
        kind: str,
        inputs: list[str],
        *,
        count: int = 1,
        outputs: list[str] | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> Any:
        """Append a node; returns the name of its output, or a list of names if there are several."""
        import onnx

        outputs = outputs or [self._name(kind.lower()) for _ in range(count)]
        self.nodes.append(onnx.helper.make_node(kind, inputs, outputs, domain=domain, **attributes))
        return outputs[0] if count == 1 else outputs

    def constant(self, name: str, value: Tensor | np.ndarray) -> str:
        """Append an initializer."""
        tensor = (value if isinstance(value, Tensor) else torch.from_numpy(value)).contiguous()
        return self.raw(name, TYPES[tensor.dtype], tensor.shape, raw_bytes(tensor))

    def raw(self, name: str, kind: int, shape: Sequence[int], content: bytes | memoryview) -> str:
        """Append an initializer from its bytes, with a type number of ``onnx.TensorProto``."""
        import onnx

        name = self._name(name)
        self.initializers.append(onnx.helper.make_tensor(name, kind, list(shape), bytes(content), raw=True))
        return name

    def sizes(self, *numbers: int) -> str:
        """A list of numbers, such as a shape, that all nodes share."""
        wanted = torch.tensor(numbers, dtype=torch.int64)
        return self.once(("sizes", numbers), lambda: self.constant("sizes", wanted))

    def cast(self, value: str, dtype: torch.dtype) -> str:
        """Append a conversion to a dtype."""
        return str(self.add("Cast", [value], to=TYPES[dtype]))

    def reshape(self, value: str, *shape: int) -> str:
        """Append a change of shape."""
        return str(self.add("Reshape", [value, self.sizes(*shape)]))

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """The result of the first call of ``make`` under this key."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def shared(self, key: Hashable) -> Any:
        """The result that :meth:`once` stored under a key, or None."""
        return self._shared.get(key)

    def _name(self, wanted: str) -> str:
        name, number = wanted, 0
        while name in self._names:
            number += 1
            name = f"{wanted}.{number}"
        self._names.add(name)
        return name


def finished(nodes: Nodes, columns: int, rows: int, opset: int) -> bytes:
    """A separate serialized model: ``x`` (positions, columns) to ``y`` (positions, rows)."""
    import onnx

    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["positions", width])
        for name, width in (("x", columns), ("y", rows))
    ]
    graph = onnx.helper.make_graph(nodes.nodes, "site", ends[:1], ends[1:], nodes.initializers)
    opsets = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(MICROSOFT, 1)]
    # The IR version of the opset; a newer onnx would write a version that this onnxruntime cannot read.
    return bytes(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=_IR).SerializeToString())
