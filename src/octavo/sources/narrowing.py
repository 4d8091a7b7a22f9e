"""Which tensors that are no sites, such as norms, biases and buffers, are stored in 16 bits."""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor

#: Dtypes of weights: what can be narrowed, and what a site can have.
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
#: Relative error that float16 may add to a value, and bfloat16: half a step of either, with a little to spare.
_HALF, _BRAIN = 2**-10, 2**-8
#: bfloat16 serves tensors of which float16 keeps at least this share of the values. What lies beyond float16 as a whole
#: is a constant of its own kind, and few bytes.
_SHARE = 0.5


class Narrowing(StrEnum):
    """How much 16 bits may change a tensor.

    Attributes
    ----------
    EXACT
        Not at all.
    EACH
        Each value keeps its relative precision.
    SCALE
        Values keep the precision of their tensor's root mean square, so that a few tiny ones among large may vanish.
        Only a measurement can say that this costs nothing.
    """

    EXACT = "exact"
    EACH = "each"
    SCALE = "scale"


def stored_dtype(tensor: Tensor, how: Narrowing) -> torch.dtype:
    """The dtype in which a tensor is stored: one of 16 bits if it may be, else its own."""
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
