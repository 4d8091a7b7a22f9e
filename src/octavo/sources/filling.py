"""Loading the tensors of an artifact into a module of the original class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import ArtifactError
from octavo.sources.modules import EXTRA_STATE, names_in_state, own_tensors, stored_tensors

#: Number of keys that an error shows.
_SHOWN = 5


def fill(module: nn.Module, state: Mapping[str, Tensor], extra: Mapping[str, Any], *, assign: bool) -> None:
    """Load a state dict into a module.

    The module's own ``load_state_dict`` is tried first. If a hook renamed tensors when saving and none renames them
    back, tensors are assigned by the names in the module's own state dict.

    Parameters
    ----------
    extra
        Plain data of the state dict. Extra state of modules is unchanged if nothing is given for it.
    assign
        Whether parameters are replaced, or only their content.

    Raises
    ------
    ArtifactError
        If tensors or parameters do not match, or shapes differ.
    """
    kind = type(module).__name__
    try:
        missing, unexpected = module.load_state_dict({**state, **extra}, strict=False, assign=assign)
    except Exception as error:
        # Hooks of a module may raise any exception for unknown names.
        if not _put(module, state, assign=assign):
            raise ArtifactError(f"does not fit {kind}: {error}") from error
        _put_extra(module, {**state, **extra})
        return
    entries = module.state_dict(keep_vars=True)
    names = names_in_state(module, entries)
    # Entries that the module's own state dict leaves out or adds are not weights.
    lacking = [name for name in missing if name in names and not name.endswith(EXTRA_STATE)]
    over = [name for name in unexpected if name not in entries or name in names]
    lost = [name for name in missing if name not in entries and over]
    if (lacking or over or lost) and not _put(module, state, assign=assign):
        raise ArtifactError(
            f"does not fit {kind}: the artifact lacks {_listed([*lacking, *lost])}, and the module does not use "
            f"{_listed(over)}; load it into the original class"
        )


def _put(module: nn.Module, state: Mapping[str, Tensor], *, assign: bool) -> bool:
    """Assign tensors by the module's own names; if they do not match one by one, change nothing and return False."""
    own, renamed = own_tensors(module), names_in_state(module, module.state_dict(keep_vars=True))
    places = {name: name if name in own else renamed.get(name) for name in state if not name.endswith(EXTRA_STATE)}
    targets = {target: state[name] for name, target in places.items() if target is not None}
    filled = {id(own[target]) for target in targets}
    if len(targets) < len(places) or any(id(tensor) not in filled for tensor in stored_tensors(module).values()):
        return False
    if any(own[target].shape != tensor.shape for target, tensor in targets.items()):
        return False
    for target, tensor in targets.items():
        if not assign:
            with torch.no_grad():
                own[target].copy_(tensor)
            continue
        prefix, _, leaf = target.rpartition(".")
        owner = module.get_submodule(prefix)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=own[target].requires_grad)
        else:
            owner._buffers[leaf] = tensor
    return True


def _put_extra(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Restore the extra state of modules."""
    parts = dict(module.named_modules())
    for name, value in state.items():
        prefix, _, leaf = name.rpartition(".")
        owner = parts.get(prefix)
        if leaf == EXTRA_STATE and owner is not None:
            try:
                owner.set_extra_state(value)
            except Exception as error:
                raise ArtifactError(
                    f"does not fit {type(module).__name__}: the module refuses the extra state {name!r}: "
                    f"{type(error).__name__}: {error}"
                ) from error


def _listed(names: list[str]) -> str:
    more = "" if len(names) <= _SHOWN else f" and {len(names) - _SHOWN} more"
    return (", ".join(map(repr, names[:_SHOWN])) or "nothing") + more
