"""Tensors as the bytes that stand in files and checksums."""

from __future__ import annotations

import torch
from torch import Tensor


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's elements in row-major order as bytes, without a copy where it is contiguous on the CPU."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in ``dtype``; a value that rounding carried beyond its range becomes the largest there is."""
    if dtype == torch.float16:
        largest = torch.finfo(dtype).max
        tensor = tensor.clamp(-largest, largest)
    return tensor.to(dtype)
