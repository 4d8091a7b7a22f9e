"""Tensors of a safetensors file, read and not mapped: a mapping of a file that is cut short kills its process."""

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
    """Where a tensor lies in a file.

    Parameters
    ----------
    offset
        Of its first byte.
    error
        What is raised if it cannot be read any more.
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
        """Its bytes, in memory of their own.

        Raises
        ------
        OctavoError
            If the file is not there any more, or became shorter.
        """
        # Loaders call this where tensors have no content by default.
        content = torch.empty(self.length, dtype=torch.uint8, device="cpu")
        try:
            with open(self.file, "rb", buffering=0) as file:
                file.seek(self.offset)
                rest = memoryview(content.numpy())  # type: ignore[arg-type]
                while len(rest) and (count := file.readinto(rest)):
                    rest = rest[count:]
        except OSError as error:
            raise self.error(
                f"{self.file}: cannot be read any more: {error.strerror or error}; put it back and start again"
            ) from error
        if len(rest):
            raise self.error(f"{self.file}: became shorter while it was read; put it back and start again")
        return content

    def tensor(self) -> Tensor:
        """The tensor, in memory of its own."""
        return self.content().view(self.dtype).reshape(self.shape)


def offsets(file: Path) -> dict[str, int]:
    """Where every tensor of a file begins, of one whose header was checked."""
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}
