"""A weight that holds packed codes, in the place of a module's dense one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from octavo.running.kernels import Geometry, Kernel, Plain
from octavo.sites import Layout


class PackedWeight(Tensor):
    """A tensor without storage of its own that runs from packed codes.

    To a module it looks like the weight it stands for: shape, dtype, tying and the module's own ``forward`` stay as
    they are. Linear layers and embeddings take the kernel, and convolutions where it has one for them; any other
    operation is given the decoded weight, which is dropped after it. It is for inference: there are no gradients, and
    its content cannot be changed.

    Parameters
    ----------
    kernel
        The weight's matrix, ready to run.
    layout
        How the weight is read as that matrix.
    shape, dtype
        Of the weight. ``dtype`` is what decoding gives; products have the dtype of their inputs.
    """

    kernel: Kernel
    matrix_layout: Layout

    @staticmethod
    def __new__(cls, kernel: Kernel, layout: Layout, shape: tuple[int, ...], dtype: torch.dtype) -> PackedWeight:
        """A wrapper of that shape; it allocates nothing."""
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)  # type: ignore[attr-defined]
        made.kernel, made.matrix_layout = kernel, layout
        return made

    def __init__(self, *_: Any) -> None:
        """Everything is done by ``__new__``, as tensors need."""

    def decode(self) -> Tensor:
        """The weight itself, in its dtype."""
        matrix = self.kernel.lookup(torch.arange(self.kernel.shape[0]))
        return self.matrix_layout.from_matrix(matrix, tuple(self.shape)).to(self.dtype)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PackedWeight(shape={tuple(self.shape)}, dtype={self.dtype}, kernel={self.kernel.name!r})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Products and lookups are run by the kernel."""
        handler = _HANDLERS.get(func)
        result = NotImplemented if handler is None else handler(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        # What tensors do by default would make results PackedWeights as well.
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Copies and casts share the codes; every other operation gets decoded weights."""
        kwargs = kwargs or {}
        if func in _COPIES:
            weight = args[0]
            return PackedWeight(weight.kernel, weight.matrix_layout, weight.shape, kwargs.get("dtype") or weight.dtype)
        args, kwargs = torch.utils._pytree.tree_map_only(PackedWeight, PackedWeight.decode, (args, kwargs))
        return func(*args, **kwargs)


_COPIES = {
    torch.ops.aten.detach.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.clone.default,
    torch.ops.aten._to_copy.default,
}


def _linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Any:
    if not _is_matrix(weight, "rows_first") or isinstance(x, PackedWeight):
        return NotImplemented
    out = weight.kernel.matmul(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], weight.shape[0])
    return out if bias is None else out + bias


def _addmm(bias: Tensor, x: Any, weight: Any) -> Any:
    """GPT-2's ``Conv1D``: ``bias + x @ weight`` with a weight of (inputs, outputs)."""
    if not _is_matrix(weight, "columns_first") or isinstance(x, PackedWeight):
        return NotImplemented
    return weight.kernel.matmul(x) + bias


def _embedding(index: Tensor, weight: Any, padding_idx: Any = None, max_norm: Any = None, *_: Any, **__: Any) -> Any:
    if not _is_matrix(weight, "rows_first") or max_norm is not None:
        return NotImplemented
    return weight.kernel.lookup(index.reshape(-1)).to(weight.dtype).view(*index.shape, weight.shape[1])


def _convolution(
    x: Any, weight: Any, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Any:  # fmt: skip
    if not isinstance(weight, PackedWeight) or isinstance(x, PackedWeight) or groups != 1:
        return NotImplemented
    out = weight.kernel.convolve(x, tuple(weight.shape), bias, Geometry(stride, padding, dilation))
    return NotImplemented if out is None else out


def _is_matrix(weight: Any, kind: str) -> bool:
    return isinstance(weight, PackedWeight) and weight.ndim == 2 and weight.matrix_layout.kind == kind


_HANDLERS: dict[Any, Callable[..., Any]] = {
    functional.linear: _linear,
    functional.embedding: _embedding,
    torch.addmm: _addmm,
    **dict.fromkeys((functional.conv1d, functional.conv2d, functional.conv3d), _convolution),
}


def held_bytes(module: nn.Module) -> int:
    """Bytes of all distinct tensors that a module holds: parameters and buffers, packed ones by their parts."""
    sizes: dict[int, int] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        for part in tensor.kernel.tensors() if isinstance(tensor, PackedWeight) else [tensor]:
            sizes[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    return sum(sizes.values())


def kernels_of(module: nn.Module) -> dict[str, list[str]]:
    """Names of a module's packed parameters by the kernels that run them."""
    users: dict[int, list[tuple[str, nn.Module]]] = {}
    for prefix, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if isinstance(parameter, PackedWeight):
                users.setdefault(id(parameter.kernel), []).append((f"{prefix}.{name}".lstrip("."), owner))
    found: dict[str, list[str]] = {}
    for (name, owner), *others in users.values():
        owners = [owner, *(other for _, other in others)]
        found.setdefault(_kernel_name(getattr(owner, name.rpartition(".")[2]), owners), []).append(name)
    return found


def _kernel_name(weight: PackedWeight, owners: list[nn.Module]) -> str:
    kind = weight.matrix_layout.kind
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d) if weight.kernel.convolves else nn.Linear
    runs = any(kind == "rows_first" and isinstance(owner, layers) for owner in owners)
    if runs or any(kind == "columns_first" and type(owner).__name__ == "Conv1D" for owner in owners):
        return " + ".join(weight.kernel.names)
    if all(isinstance(owner, nn.Embedding) for owner in owners):
        return "lookup (rows decoded)"
    return Plain.name
