"""Tensors of a safetensors file, read and not mapped: a mapping of a file that is cut short kills its process."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from octavo.errors import RequestError


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a file."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """The tensor, in memory of its own.

        Raises
        ------
        RequestError
            If the file is not there any more, or became shorter.
        """
        content = torch.empty(math.prod(self.shape) * self.dtype.itemsize, dtype=torch.uint8)
        try:
            with open(self.file, "rb", buffering=0) as file:
                file.seek(self.offset)
                rest = memoryview(content.numpy())  # type: ignore[arg-type]
                while len(rest) and (count := file.readinto(rest)):
                    rest = rest[count:]
        except OSError as error:
            raise RequestError(
                f"{self.file}: cannot be read any more: {error.strerror or error}; put it back and start again"
            ) from error
        if len(rest):
            raise RequestError(f"{self.file}: became shorter while it was read; put it back and start again")
        return content.view(self.dtype).reshape(self.shape)


def offsets(file: Path) -> dict[str, int]:
    """Where every tensor of a file begins, of one whose header was checked."""
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}
