"""Restoring a module if the artifact to load into it is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from octavo.errors import ArtifactError
from octavo.sources.modules import own_tensors, stored_tensors


@contextmanager
def unless_refused(module: nn.Module, *, values: bool) -> Iterator[None]:
    """A context in which a module's tensors are replaced and changed; an error undoes both.

    Parameters
    ----------
    values
        Whether values are copied to be restored, which takes the module's memory once more. Otherwise only tensor
        objects are restored.
    """
    held = [(part, dict(part._parameters), dict(part._buffers), dict(part.__dict__)) for part in module.modules()]
    copies: list[tuple[Tensor, Tensor]] = []
    if values:
        distinct = {id(tensor): tensor for tensor in own_tensors(module).values() if not tensor.is_meta}
        copies = [(tensor, tensor.detach().clone()) for tensor in distinct.values() if type(tensor) in _PLAIN]
    try:
        yield
    except BaseException:
        for part, parameters, buffers, own in held:
            part.__dict__.clear()
            part.__dict__.update(own)
            part._parameters.clear()
            part._parameters.update(parameters)
            part._buffers.clear()
            part._buffers.update(buffers)
        with torch.no_grad():
            for tensor, copy in copies:
                tensor.copy_(copy)
        raise


#: Packed weights hold codes, which are never changed.
_PLAIN = (Tensor, nn.Parameter)


def fits_plainly(module: nn.Module, names: dict[str, tuple[int, ...]]) -> bool:
    """Whether loading cannot fail: names and shapes match the module, and none of its code runs."""
    tensors = stored_tensors(module)
    if any(is_lazy(tensor) for tensor in tensors.values()):
        return False
    own = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return names == own and all(
        type(part)._load_from_state_dict in _ORDINARY
        and type(part).set_extra_state is nn.Module.set_extra_state
        and not part._load_state_dict_pre_hooks
        and not part._load_state_dict_post_hooks
        for part in module.modules()
    )


#: Loaders that only write tensors of matching shape.
_ORDINARY = (nn.Module._load_from_state_dict, nn.modules.batchnorm._NormBase._load_from_state_dict)


def materialise(module: nn.Module) -> None:
    """Allocate parameters and buffers on the ``meta`` device; tied tensors stay tied.

    Raises
    ------
    ArtifactError
        If a buffer on the ``meta`` device is not stored with weights, so that nothing can fill it.
    """
    stored = {id(tensor) for tensor in stored_tensors(module).values()}
    empty = {name: tensor for name, tensor in own_tensors(module).items() if tensor.is_meta}
    for name, tensor in empty.items():
        if id(tensor) not in stored:
            raise ArtifactError(
                f"does not fit {type(module).__name__}: its buffer {name!r} is on the meta device and is not stored "
                "with weights; build the module on a real device, or fill that buffer first"
            )
    made: dict[int, Tensor] = {}
    for name, tensor in empty.items():
        if id(tensor) not in made:
            new = torch.empty_like(tensor, device="cpu")
            made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
        prefix, _, leaf = name.rpartition(".")
        owner = module.get_submodule(prefix)
        (owner._parameters if leaf in owner._parameters else owner._buffers)[leaf] = made[id(tensor)]  # type: ignore[assignment]
