"""The content of an ``nn.Module``: its tensors, their names in its state dict, and entries that are not tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from octavo.coding.container import DTYPES as INTEGERS
from octavo.errors import RequestError
from octavo.sources.narrowing import FLOATS

#: Dtypes stored bit for bit, besides those of weights and integers.
_OTHERS = (
    "complex32", "complex64", "complex128", "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2",
    "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
)  # fmt: skip
#: Some versions of torch lack some of them.
SUPPORTED = {*FLOATS, *INTEGERS, *(getattr(torch, name) for name in _OTHERS if hasattr(torch, name))}
EXTRA_STATE = "_extra_state"


@dataclass
class State:
    """The state dict of a module, with information on its entries.

    Parameters
    ----------
    tensors
        Tensors by the names that ``load_state_dict`` expects.
    parameters
        Maps names to the module's own names, for all tensors of the module. They differ if a state dict hook renames
        tensors.
    fixed
        Tensors that must not be coded, and why.
    extra
        Entries that are plain data, such as numbers and texts.
    notes
        Notes on entries that are left out.
    """

    tensors: dict[str, Tensor]
    parameters: dict[str, str]
    fixed: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside wrappers for compilation and data parallelism, which only rename its tensors."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = module.module
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by their own names (tied ones under each), without state dict hooks."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def stored_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of :func:`own_tensors` without non-persistent buffers."""
    passing = {
        f"{prefix}.{name}".removeprefix(".")
        for prefix, owner in module.named_modules(remove_duplicate=False)
        for name in owner._non_persistent_buffers_set
    }
    return {name: tensor for name, tensor in own_tensors(module).items() if name not in passing}


def state_of(module: nn.Module) -> State:
    """The state dict of a module.

    Raises
    ------
    RequestError
        If the module is scripted, or one of its tensors has no content or a dtype or type that cannot be stored.
    """
    check_module(module)
    kind = type(module).__name__
    try:
        entries = module.state_dict(keep_vars=True)
    except Exception as error:
        # State dict hooks are user code.
        raise RequestError(
            f"{kind}: its state_dict() fails: {type(error).__name__}: {error}; correct the hooks of the module"
        ) from error
    stored, extra = stored_tensors(module), {k: v for k, v in entries.items() if not isinstance(v, Tensor)}
    names = names_in_state(module, entries)
    tensors = {name: tensor for name, tensor in entries.items() if isinstance(tensor, Tensor)}
    reached = {id(stored[own]) for own in names.values() if own in stored}
    lost = [name for name, tensor in stored.items() if id(tensor) not in reached]
    strange = [name for name in tensors if name not in names]
    if lost and any(not name.endswith(EXTRA_STATE) for name in strange):
        # A hook derives other tensors from the module's own; the module's own are what runs, so they are stored.
        tensors = {**stored, **{name: tensors[name] for name in strange if name.endswith(EXTRA_STATE)}}
        names, lost = {name: name for name in stored}, []
        extra = {name: value for name, value in extra.items() if name.endswith(EXTRA_STATE)}
    state = State(tensors, names)
    for name, tensor in tensors.items():
        _check_tensor(kind, name, tensor)
        if name not in names:
            state.fixed[name] = "extra state" if name.endswith(EXTRA_STATE) else "added by a state dict hook"
    for name, value in extra.items():
        if _is_plain(value):
            state.extra[name] = value
        else:
            state.notes.append(
                f"{name}: {type(value).__name__} is not plain data (JSON), so it is not stored; the module that the "
                "artifact is loaded into keeps its value"
            )
    hidden = list(_hidden(module))
    if hidden:
        state.notes.append(
            f"{kind}: {', '.join(hidden[:3])}{' and more' if len(hidden) > 3 else ''} are not in its state dict and "
            "are neither compressed nor stored: the module that the artifact is loaded into keeps its values; if they "
            "are part of the model, register them, for example with nn.ModuleList or register_buffer"
        )
    if lost:
        state.notes.append(
            f"{kind}: its state dict leaves out {len(lost)} of its tensors ({', '.join(lost[:3])}): they are not stored"
        )
    return state


def _hidden(module: nn.Module) -> Iterator[str]:
    """Names of modules and floating tensors in plain attributes, lists or dictionaries."""
    known = {id(part) for part in module.modules()} | {id(tensor) for tensor in own_tensors(module).values()}
    for prefix, part in module.named_modules():
        # The hooks of weight and spectral norm compute this tensor before every call.
        derived = {getattr(hook, "name", None) for hook in part._forward_pre_hooks.values()}
        for name, value in vars(part).items():
            if name.startswith("_") or name in derived:
                continue
            values = (
                value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
            )
            if any(
                id(item) not in known
                and (
                    (isinstance(item, nn.Module) and any(True for _ in item.parameters()))
                    or (isinstance(item, Tensor) and item.is_floating_point() and item.ndim > 1)
                )
                for item in values
            ):
                yield f"{prefix}.{name}".removeprefix(".")


def names_in_state(module: nn.Module, entries: Mapping[str, Any]) -> dict[str, str]:
    """Maps state dict names to the module's own names, for tensors of the module."""
    own = own_tensors(module)
    by_identity: dict[int, str] = {}
    for name, tensor in own.items():
        by_identity.setdefault(id(tensor), name)
    names = {}
    for name, entry in entries.items():
        if own.get(name) is not entry and id(entry) in by_identity:
            names[name] = by_identity[id(entry)]
        elif name in own and isinstance(entry, Tensor) and entry.shape == own[name].shape:
            # A hook may return a copy under the same name.
            names[name] = name
    return names


def check_module(module: nn.Module) -> None:
    """Refuse modules without content, and scripted modules."""
    kind = type(module).__name__
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        raise RequestError(
            f"{kind}: is a scripted or traced module, whose parts cannot be observed; give the original eager module"
        )
    for name, tensor in own_tensors(module).items():
        if is_lazy(tensor):
            raise RequestError(
                f"{kind}: {name!r} is not initialised yet, so there is nothing to compress; call the lazy module once "
                "on a batch, and load or train its weights"
            )
        if tensor.is_meta:
            raise RequestError(
                f"{kind}: {name!r} is on the meta device and has no content, as in a partly offloaded module; load the "
                "whole module to the CPU (without device_map), or fill it: "
                "module.to_empty(device='cpu').load_state_dict(...)"
            )


def _check_tensor(kind: str, name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.dtype not in SUPPORTED:
        what = f"dtype {tensor.dtype}" if tensor.layout == torch.strided else f"layout {tensor.layout}"
        raise RequestError(f"{kind}: {name!r} has {what}, which cannot be stored; make it a dense tensor of floats")
    try:
        plain = tensor.numel() == 0 or tensor.data_ptr() != 0
    except RuntimeError:
        plain = False
    if not plain:
        raise RequestError(
            f"{kind}: {name!r} is a {type(tensor).__name__} without its own storage; give the module with plain "
            "tensors, as before quantizing or distributing it"
        )


def _is_plain(value: Any) -> bool:
    """Whether a value survives a JSON round trip."""
    try:
        return _same(json.loads(json.dumps(value, allow_nan=False)), value)
    except (TypeError, ValueError, RecursionError):
        return False


def _same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
