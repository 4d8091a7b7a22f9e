"""Tensors of a module get other shapes, and the sizes that its layers state follow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import RequestError

#: The query projection of an attention module of ``transformers``, and its key projection, by name.
_QUERIES = {"q_proj": "k_proj", "query": "key", "q_lin": "k_lin"}
#: Attributes in which such a module states how many heads it has.
_COUNTS = ("num_heads", "num_attention_heads", "n_heads")


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
    if made:
        _count_heads(model.modules())


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


def _count_heads(modules: Iterable[Any]) -> None:
    """Let the attention modules of ``transformers`` state as many heads as their projections hold.

    The size of a head stays what it was: a module that was built for more heads runs with fewer.
    """
    for module in modules:
        size = getattr(module, "head_dim", getattr(module, "attention_head_size", None))
        if not isinstance(size, int) or size < 1:
            continue
        width = key_width = None
        for query, key in _QUERIES.items():
            if isinstance(projection := getattr(module, query, None), nn.Linear):
                width, key_width = projection.out_features, getattr(module, key).out_features
        fused: Any = getattr(module, "c_attn", None)
        if type(fused).__name__ == "Conv1D" and not hasattr(module, "q_attn"):
            width = key_width = fused.nf // 3
        if width is None or key_width is None:
            continue
        for name in _COUNTS:
            if hasattr(module, name):
                setattr(module, name, width // size)
        for name in ("all_head_size", "split_size"):
            if hasattr(module, name):
                setattr(module, name, width)
        if hasattr(module, "num_key_value_groups"):
            module.num_key_value_groups = width // key_width
