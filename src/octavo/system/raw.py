"""Tensors as raw bytes for files and checksums."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's elements in row-major order as bytes; not a copy if it is contiguous on the CPU."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if not plain.numel():
        return memoryview(b"")
    return memoryview(plain.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in ``dtype``; a value rounded beyond its range becomes the largest finite value."""
    if dtype == torch.float16:
        largest = torch.finfo(dtype).max
        tensor = tensor.clamp(-largest, largest)
    return tensor.to(dtype)


class Lazily(Mapping[str, Tensor]):
    """Tensors by name, made each time they are requested and not kept.

    Parameters
    ----------
    made
        The function that makes each tensor.
    """

    def __init__(self, made: Mapping[str, Callable[[], Tensor]]) -> None:
        self.made = made

    def __getitem__(self, name: str) -> Tensor:
        return self.made[name]()

    def __contains__(self, name: object) -> bool:
        return name in self.made

    def __iter__(self) -> Iterator[str]:
        return iter(self.made)

    def __len__(self) -> int:
        return len(self.made)
