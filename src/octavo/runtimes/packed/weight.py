"""A weight that holds packed codes and replaces a module's dense weight."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from octavo.errors import RequestError
from octavo.forms import Form
from octavo.runtimes.packed.kernels import DenseKernel, Geometry, Kernel, kernel_for
from octavo.sources.sites import Layout


class PackedWeight(Tensor):
    """A tensor without storage that runs from packed codes.

    To a module it looks like the weight that it represents: shape, dtype, tying and the module's own ``forward`` do not
    change. Linear layers, embeddings and supported convolutions use the kernel. Any other operation gets the decoded
    weight, which is dropped afterwards. It is for inference: there are no gradients, and its content cannot be changed.

    Parameters
    ----------
    kernel
        The weight's matrix, ready to run.
    layout
        How the weight is read as the matrix.
    shape, dtype
        Shape and dtype of the decoded weight; products have the dtype of their inputs.
    """

    kernel: Kernel
    matrix_layout: Layout

    @staticmethod
    def __new__(cls, kernel: Kernel, layout: Layout, shape: tuple[int, ...], dtype: torch.dtype) -> PackedWeight:
        """A wrapper of the given shape that allocates nothing."""
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)  # type: ignore[attr-defined]
        made.kernel, made.matrix_layout = kernel, layout
        return made

    def __init__(self, *_: Any) -> None:
        """Does nothing: ``__new__`` does everything, as tensors require."""

    def decode(self) -> Tensor:
        """The decoded weight in its dtype."""
        return self.matrix_layout.from_matrix(self.kernel.dense(), tuple(self.shape)).to(self.dtype)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PackedWeight(shape={tuple(self.shape)}, dtype={self.dtype}, kernel={self.kernel.name!r})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The kernel runs products and lookups."""
        handler = _HANDLERS.get(func)
        result = NotImplemented if handler is None else handler(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        # By default results would be PackedWeights as well.
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Copies and casts share the codes; every other operation gets decoded weights, and none changes them."""
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            given = [*args, *(kwargs.get(argument.name) for argument in func._schema.arguments[len(args) :])]
            for argument, value in zip(func._schema.arguments, given, strict=True):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    torch.utils._pytree.tree_map_only(PackedWeight, _refuse_change, value)
        if func in _COPIES:
            weight, device = args[0], torch.device(kwargs.get("device") or "cpu")
            if device.type != "cpu":
                raise RequestError(
                    f"a packed or factored weight of shape {tuple(weight.shape)} runs on a CPU, not on {device}; load "
                    "the artifact without packed= and factors= to move the model"
                )
            return PackedWeight(weight.kernel, weight.matrix_layout, weight.shape, kwargs.get("dtype") or weight.dtype)
        args, kwargs = torch.utils._pytree.tree_map_only(PackedWeight, PackedWeight.decode, (args, kwargs))
        return func(*args, **kwargs)


def packed_weight(form: Form, layout: Layout, shape: tuple[int, ...], dtype: torch.dtype) -> PackedWeight:
    """A weight that runs from its form with the best kernel that this machine has for it."""
    return PackedWeight(kernel_for(form), layout, shape, dtype)


#: Weights decoded for the latest state dict.
_DECODED: weakref.WeakKeyDictionary[Kernel, weakref.ref[Tensor]] = weakref.WeakKeyDictionary()
_COPIES = {
    torch.ops.aten.detach.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.clone.default,
    torch.ops.aten._to_copy.default,
}


def _refuse_change(weight: PackedWeight, *_: Any) -> None:
    raise RequestError(
        f"a packed or factored weight of shape {tuple(weight.shape)} cannot be changed in place: it holds no dense "
        "numbers. Load the artifact without packed= and factors=, or put a dense parameter in its place"
    )


def _refuse_sharing(weight: PackedWeight, *_: Any) -> None:
    raise RequestError(
        f"a packed or factored weight of shape {tuple(weight.shape)} has no storage to share between processes; load "
        "the artifact in every process, or without packed= and factors="
    )


# Parameters of handlers have the names of the functions that they replace.
def _linear(input: Any, weight: Any, bias: Tensor | None = None) -> Any:
    if not _is_matrix(weight, "rows_first") or isinstance(input, PackedWeight):
        return NotImplemented
    out = weight.kernel.matmul(input.reshape(-1, input.shape[-1])).view(*input.shape[:-1], weight.shape[0])
    return out if bias is None else out + bias


def _addmm(input: Tensor, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1, out: Any = None) -> Any:
    """GPT-2's ``Conv1D``: ``bias + x @ weight`` with a weight of (inputs, outputs)."""
    if not _is_matrix(mat2, "columns_first") or isinstance(mat1, PackedWeight) or (beta, alpha, out) != (1, 1, None):
        return NotImplemented
    return mat2.kernel.matmul(mat1) + input


def _embedding(input: Tensor, weight: Any, padding_idx: Any = None, max_norm: Any = None, *_: Any, **__: Any) -> Any:
    if not _is_matrix(weight, "rows_first") or max_norm is not None:
        return NotImplemented
    rows, columns = weight.shape
    if input.numel() and not 0 <= int(input.min()) <= int(input.max()) < rows:
        raise IndexError(f"indices from {int(input.min())} to {int(input.max())} exceed a table of {rows} rows")
    return weight.kernel.lookup(input.reshape(-1)).to(weight.dtype).view(*input.shape, columns)


def _convolution(
    input: Any, weight: Any, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Any:  # fmt: skip
    if not isinstance(weight, PackedWeight) or isinstance(input, PackedWeight) or groups != 1:
        return NotImplemented
    out = weight.kernel.convolve(input, tuple(weight.shape), bias, Geometry(stride, padding, dilation))
    return NotImplemented if out is None else out


def _is_matrix(weight: Any, kind: str) -> bool:
    return isinstance(weight, PackedWeight) and weight.ndim == 2 and weight.matrix_layout.kind == kind


_HANDLERS: dict[Any, Callable[..., Any]] = {
    functional.linear: _linear,
    functional.embedding: _embedding,
    torch.addmm: _addmm,
    # Assigning to a part would only change a decoded copy.
    Tensor.__setitem__: _refuse_change,
    Tensor.share_memory_: _refuse_sharing,
    **dict.fromkeys((functional.conv1d, functional.conv2d, functional.conv3d), _convolution),
}


def decode_in_state(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A hook after a module's ``state_dict`` that decodes packed weights; tied weights stay one tensor."""
    for name, weight in module._parameters.items():
        if isinstance(weight, PackedWeight) and isinstance(state.get(prefix + name), PackedWeight):
            known = _DECODED.get(weight.kernel, lambda: None)()
            if known is None or not any(value is known for value in state.values()):
                known = weight.decode()
                _DECODED[weight.kernel] = weakref.ref(known)
            state[prefix + name] = known


def without_packed(module: nn.Module) -> None:
    """Replace packed parameters by dense ones; tied parameters stay tied."""
    dense: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, weight in owner._parameters.items():
            if isinstance(weight, PackedWeight):
                if id(weight) not in dense:
                    dense[id(weight)] = nn.Parameter(weight.decode())
                owner._parameters[name] = dense[id(weight)]


def held_bytes(held: nn.Module | Mapping[str, Any]) -> int:
    """Bytes of all distinct tensors of a module or dictionary; packed tensors count by their parts."""
    sizes: dict[int, int] = {}
    every = [*held.parameters(), *held.buffers()] if isinstance(held, nn.Module) else held.values()
    for tensor in every:
        if not isinstance(tensor, torch.Tensor):
            continue  # plain data next to the tensors
        for part in tensor.kernel.tensors() if isinstance(tensor, PackedWeight) else [tensor]:
            sizes[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    return sum(sizes.values())


def kernels_of(module: nn.Module) -> dict[str, list[str]]:
    """Names of a module's packed parameters, by kernel."""
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
    return DenseKernel.name
