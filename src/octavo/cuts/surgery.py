"""Tensors of a module get other shapes, and the sizes that its layers state follow."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from octavo.cuts.base import Units, check_kept, left
from octavo.errors import RequestError
from octavo.forms import Dense, Form, Trimmed


def without(model: nn.Module, units: Sequence[Units], kept: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model whose tensors have lost all slices of the units that are not kept.

    Raises
    ------
    RequestError
        If ``kept`` does not fit the units, or a tensor the layer that it belongs to.

    Examples
    --------
    >>> from octavo.cuts import Slice
    >>> net, places = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.arange(4)[:, None]
    >>> slices = tuple(Slice(name, dim, places) for name, dim in (("0.weight", 0), ("0.bias", 0), ("2.weight", 1)))
    >>> hidden = Units("0", "neuron", 4, slices)
    >>> without(net, [hidden], {"0": torch.tensor([True, False, True, False])})
    Sequential(
      (0): Linear(in_features=3, out_features=2, bias=True)
      (1): ReLU()
      (2): Linear(in_features=2, out_features=2, bias=True)
    )
    """
    check_kept(units, kept)
    thinner = copy.deepcopy(model)
    smaller = {}
    for name, masks in left(model, units, kept).items():
        tensor = model.state_dict(keep_vars=True)[name].detach()
        for dim, mask in enumerate(masks):
            tensor = tensor.index_select(dim, mask.nonzero()[:, 0].to(tensor.device))
        smaller[name] = tensor
    resize(thinner, smaller)
    return thinner


def trimmed(model: nn.Module, units: Sequence[Units], kept: Mapping[str, Tensor]) -> dict[str, Form]:
    """Forms of all matrices that lose slices, which store what is left of them and run as zeros elsewhere.

    Raises
    ------
    RequestError
        If ``kept`` does not fit the units.

    Examples
    --------
    >>> from octavo.cuts import Slice
    >>> net, places = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.arange(4)[:, None]
    >>> hidden = Units("0", "neuron", 4, (Slice("0.weight", 0, places), Slice("2.weight", 1, places)))
    >>> forms = trimmed(net, [hidden], {"0": torch.tensor([True, False, True, False])})
    >>> {name: tuple(form.inner.weight.shape) for name, form in forms.items()}
    {'0.weight': (2, 3), '2.weight': (2, 2)}
    """
    check_kept(units, kept)
    own, forms = model.state_dict(), dict[str, Form]()
    for name, masks in left(model, units, kept).items():
        if len(masks) == 2:
            rows, columns = masks
            forms[name] = Trimmed(Dense(own[name][rows][:, columns].clone()), rows, columns)
    return forms


def skeleton(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """A copy of a model whose tensors have other shapes; their content is yet to be loaded.

    ``octavo.load(path, into=skeleton(model, octavo.Artifact(path).loadable_shapes()))`` gives back a model that was cut
    before it was compressed.
    """
    made, own = copy.deepcopy(model), model.state_dict(keep_vars=True)
    resize(made, {n: own[n].new_zeros(s) for n, s in shapes.items() if n in own and tuple(own[n].shape) != tuple(s)})
    return made


@torch.no_grad()
def resize(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Exchange parameters and buffers, in place. A tensor that two modules share is exchanged in both.

    Raises
    ------
    RequestError
        If the tensors of a layer do not fit together afterwards.
    """
    owners = {id(tensor): new for name, new in tensors.items() for tensor in [_tensor(model, name)]}
    made: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        touched = False
        for leaf, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in owners:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(owners[id(parameter)].clone(), parameter.requires_grad)
                module._parameters[leaf], touched = made[id(parameter)], True
        for leaf, buffer in module._buffers.items():
            if buffer is not None and id(buffer) in owners:
                module._buffers[leaf], touched = owners[id(buffer)].clone(), True
        if touched:
            _restate(path, module)


def _tensor(model: nn.Module, name: str) -> Tensor:
    prefix, _, leaf = name.rpartition(".")
    owner = model.get_submodule(prefix)
    found = owner._parameters.get(leaf, owner._buffers.get(leaf))
    if found is None:
        raise RequestError(f"{type(model).__name__} has no parameter or buffer {name!r} that could get another shape")
    return found


def _restate(path: str, module: nn.Module) -> None:
    """Let a layer state the sizes that its tensors have, and refuse tensors that do not fit each other."""
    weight = module._parameters.get("weight")
    if weight is None:
        return
    rows = len(weight)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = rows, weight.shape[1]
    elif isinstance(module, nn.Embedding):
        if module.padding_idx is not None and rows != module.num_embeddings:
            raise RequestError(f"{path!r}: rows of an embedding with a padding row cannot be cut")
        module.num_embeddings, module.embedding_dim = rows, weight.shape[1]
    elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        # Every channel of its own stays so; in other groups channels would belong to another one.
        if module.groups == module.in_channels > 1:
            module.groups = rows
        elif module.groups > 1:
            raise RequestError(f"{path!r}: a convolution in {module.groups} groups cannot be cut")
        module.out_channels, module.in_channels = rows, weight.shape[1] * module.groups
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = rows
    elif type(module).__name__ == "Conv1D":  # a linear layer of transformers that holds (inputs, outputs)
        inputs, rows = weight.shape
        module.__dict__.update(nx=inputs, nf=rows)
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.modules.conv._ConvTransposeNd | nn.GroupNorm):
        raise RequestError(f"{path!r}: {type(module).__name__} cannot be cut")
    for leaf in ("bias", "running_mean", "running_var"):
        beside = module._parameters.get(leaf, module._buffers.get(leaf))
        if beside is not None and len(beside) != rows:
            raise RequestError(f"{path!r}: {leaf} has {len(beside)} entries for a weight of {rows} rows; cut both")
