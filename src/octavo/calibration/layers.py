"""Modules whose output is their input times their weight, so that input moments describe them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from octavo.sources.sites import Site

_CLASSES: tuple[type[nn.Module], ...] = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


def is_layer(module: nn.Module, leaf: str) -> bool:
    """Whether a module only multiplies its input by its tensor ``leaf``.

    A class with its own ``forward`` may do anything. Embeddings are the exception: many scale their rows, which is
    tested when they run (:func:`scale_of_table`).
    """
    if leaf != "weight" or "weight" not in {**module._parameters, **module._buffers} or "forward" in module.__dict__:
        return False
    if isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D":
        return True
    return any(isinstance(module, cls) and type(module).forward is cls.forward for cls in _CLASSES)


def scale_of_table(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> float | None:
    """The factor by which an embedding scales the looked-up rows; None if it does anything else.

    The module is called once without gradients. For example, learned positions take a mask or a length as first
    argument and are not a table of tokens.
    """
    tokens = args[0] if args else next(iter(kwargs.values()), None)
    weight = module.weight
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.dtype == torch.bool:
        return None
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        output = module.forward(*args, **kwargs)
        if not isinstance(output, Tensor) or output.shape != (*tokens.shape, weight.shape[1]) or not tokens.numel():
            return None
        if int(tokens.min()) < 0 or int(tokens.max()) >= len(weight):
            return None
        rows = weight[tokens].to(output.dtype)
        power = float(rows.float().square().sum())
        scale = float((rows.float() * output.float()).sum()) / power if power else 0.0
        same = torch.allclose(output.float(), scale * rows.float(), rtol=1e-2, atol=1e-3 * float(output.abs().max()))
    return scale if same and scale else None


def columns_of(module: nn.Module, site: Site, inputs: Tensor) -> Tensor:
    """Input vectors of a site as (samples, columns); for grouped layers, all groups concatenated."""
    if site.layout.kind == "transposed":
        channels = inputs.movedim(1, -1).reshape(-1, inputs.shape[1] // site.layout.groups)
        return channels
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        patches = nn.functional.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
        windows = zip(module.kernel_size, module.stride, module.dilation, strict=True)
        for axis, (kernel, stride, dilation) in enumerate(windows, 2):
            patches = patches.unfold(axis, (kernel - 1) * dilation + 1, stride)[..., ::dilation]
        # (examples, channels, *positions, *kernel)
        positions = math.prod(patches.shape[2 : 2 + len(module.kernel_size)])
        split = patches.reshape(len(patches), module.groups, site.shape[1], positions, -1)
        return split.movedim(2, 3).reshape(-1, site.columns)
    return inputs.reshape(-1, site.columns)
