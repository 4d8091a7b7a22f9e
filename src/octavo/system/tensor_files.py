"""Tensors of a safetensors file, read and not mapped: if a mapped file is truncated, the process is killed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from octavo.errors import OctavoError, RequestError


@dataclass(frozen=True)
class Place:
    """The location of a tensor in a file.

    Parameters
    ----------
    offset
        Offset of its first byte.
    error
        The exception class to raise if it can no longer be read.
    """

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    error: type[OctavoError] = RequestError

    @property
    def length(self) -> int:
        """Its bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def content(self) -> Tensor:
        """Read the tensor's bytes into new memory.

        Raises
        ------
        OctavoError
            If the file was removed or truncated.
        """
        # Loaders call this where the default device is meta, which has no content.
        content = torch.empty(self.length, dtype=torch.uint8, device="cpu")
        try:
            with open(self.file, "rb", buffering=0) as file:
                file.seek(self.offset)
                rest = memoryview(content.numpy())  # type: ignore[arg-type]
                while len(rest) and (count := file.readinto(rest)):
                    rest = rest[count:]
        except OSError as error:
            raise self.error(
                f"{self.file}: can no longer be read: {error.strerror or error}; put it back and start again"
            ) from error
        if len(rest):
            raise self.error(f"{self.file}: truncated while it was read; put it back and start again")
        return content

    def tensor(self) -> Tensor:
        """The tensor in new memory."""
        return self.content().view(self.dtype).reshape(self.shape)


def offsets(file: Path) -> dict[str, int]:
    """The offset of every tensor of a file whose header was checked."""
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}
