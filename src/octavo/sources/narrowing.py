"""Storing tensors that are not sites, such as norms, biases and buffers, in 16 bits."""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor

#: Dtypes of weights, which can be narrowed and which a site can have.
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
#: Relative rounding error allowed for float16 and bfloat16: half a step, plus a small margin.
_HALF, _BRAIN = 2**-10, 2**-8
#: bfloat16 is used if float16 keeps at least this share of the values. Tensors entirely outside of float16 are special
#: constants with few bytes.
_SHARE = 0.5


class Narrowing(StrEnum):
    """How much storing a tensor in 16 bits may change it.

    Attributes
    ----------
    EXACT
        No change.
    EACH
        Each value keeps its relative precision.
    SCALE
        Values keep the precision of their tensor's root mean square, so a few tiny values may become zero. Only a
        measurement can show that this costs nothing.
    """

    EXACT = "exact"
    EACH = "each"
    SCALE = "scale"


def stored_dtype(tensor: Tensor, how: Narrowing) -> torch.dtype:
    """The stored dtype of a tensor: 16 bits if allowed, else its own."""
    if tensor.dtype not in FLOATS or tensor.dtype.itemsize <= 2:
        return tensor.dtype
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
            return dtype
    values = tensor.double()
    if how == Narrowing.EXACT or not bool(torch.isfinite(values).all()):
        return tensor.dtype
    size = values.abs()
    error = (tensor.half().double() - values).abs()
    scale = float(size.square().mean().sqrt()) if how == Narrowing.SCALE else 0.0
    if bool((error <= _HALF * size.clamp_min(scale)).all()):
        return torch.float16
    most = float((error <= _HALF * size).double().mean()) >= _SHARE
    brain = (tensor.bfloat16().double() - values).abs() <= _BRAIN * size
    return torch.bfloat16 if most and bool(brain.all()) else tensor.dtype
