"""A module that is as it was if what was to be loaded into it is refused."""

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
    """A context in which a module's tensors are exchanged and written to; an error in it undoes both.

    Parameters
    ----------
    values
        Whether the values of tensors must be copied to be restored, which takes the memory of the module once more.
        Without it only the tensors themselves are put back.
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


#: What is packed holds codes, which nothing writes to.
_PLAIN = (Tensor, nn.Parameter)


def fits_plainly(module: nn.Module, names: dict[str, tuple[int, ...]]) -> bool:
    """Whether nothing can go wrong: names and shapes are the module's own, and no code of its own is run."""
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


#: Loaders that write a tensor only where its shape fits.
_ORDINARY = (nn.Module._load_from_state_dict, nn.modules.batchnorm._NormBase._load_from_state_dict)


def materialise(module: nn.Module) -> None:
    """Give parameters and buffers on the ``meta`` device memory, tied ones as one.

    Raises
    ------
    ArtifactError
        If a buffer has no content that is not stored with weights: only whoever built the module could fill it.
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
