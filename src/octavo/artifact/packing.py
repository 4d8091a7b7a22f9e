"""Converting forms to bytes and back."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import octavo.forms as forms
from octavo import coding
from octavo.coding import Allowance
from octavo.coding.container import MAX_DIMENSIONS
from octavo.errors import ArtifactError, OctavoError
from octavo.forms.base import allowance_for
from octavo.system.raw import raw_bytes

DTYPES = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}

#: Bytes that a form takes in memory while it runs, if it has so many rows; None where they are not counted.
Resident = Callable[[forms.Form, int], int | None]


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype, such as ``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class StoredBytes:
    """Bytes that stay in a file until they are needed.

    Parameters
    ----------
    path, offset, length
        Their location.
    crc
        Their CRC-32.
    """

    path: Path
    offset: int
    length: int
    crc: int

    def __len__(self) -> int:
        return self.length

    def read(self) -> bytes:
        """The bytes; raises :class:`OctavoError` if they no longer exist."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                content = file.read(self.length)
        except OSError as error:
            raise OctavoError(f"{self.path}: unfinished work cannot be read: {error.strerror or error}") from error
        if len(content) != self.length or zlib.crc32(content) != self.crc:
            raise OctavoError(f"{self.path}: unfinished work was changed while it was in use; start again")
        return content


@dataclass(frozen=True)
class Sized:
    """A number of bytes, counted or estimated, without content; enough to compute artifact sizes."""

    length: int
    #: A placeholder with as many digits as a checksum can have.
    crc: int = 2**32 - 1

    def __len__(self) -> int:
        return self.length


@dataclass(frozen=True)
class Packed:
    """A form as bytes.

    Parameters
    ----------
    content
        All parts, concatenated: in memory, in a file (so that a whole model takes no memory), or only their size.
    parts
        Maps part names to ``[offset, length]`` for coded integers, or ``[offset, length, dtype, *shape]`` for floats.
    meta
        The form's manifest entry.
    codecs
        Bytes by codec, for the report.
    resident
        Bytes that the form takes while it runs; None where they are not counted.
    """

    content: bytes | StoredBytes | Sized
    parts: dict[str, list]
    meta: dict[str, Any]
    codecs: dict[str, int]
    resident: int | None = None

    @property
    def blob(self) -> bytes:
        """The content; read on every access if it is stored."""
        return self.read()

    def read(self) -> bytes:
        """The content."""
        if isinstance(self.content, Sized):
            raise ValueError("only the size of this form is known")
        return self.content.read() if isinstance(self.content, StoredBytes) else self.content

    @property
    def bytes(self) -> int:
        """Stored bytes of the content; its manifest entry and header are counted with the artifact."""
        return len(self.content)

    @cached_property
    def crc(self) -> int:
        """CRC-32 of the content."""
        return zlib.crc32(self.content) if isinstance(self.content, bytes) else self.content.crc


def pack(form: forms.Form, resident: Resident | None = None) -> Packed:
    """Code all parts of a form, each integer tensor by whichever codec is smallest.

    Parameters
    ----------
    resident
        Tells what the form takes while it runs, where that counts.
    """
    chunks, parts, codecs, offset = [], {}, dict[str, int](), 0
    contexts = {id(tensor): context for tensor, context in form.contexts()}
    for name, tensor in form.tensors().items():
        if tensor.dtype.is_floating_point:
            chunk = raw_bytes(tensor).tobytes()
            parts[name] = [offset, len(chunk), dtype_name(tensor.dtype), *tensor.shape]
            codec = "raw"
        else:
            chunk = coding.encode(tensor.cpu(), contexts.get(id(tensor)))
            parts[name] = [offset, len(chunk)]
            codec = coding.describe(chunk).codec
        codecs[codec] = codecs.get(codec, 0) + len(chunk)
        chunks.append(chunk)
        offset += len(chunk)
    running = None if resident is None else resident(form, form.shape[0])
    return Packed(b"".join(chunks), parts, form.meta(), codecs, running)


def unpack(
    blob: memoryview, parts: Any, meta: Any, shape: tuple[int, int], allowance: Allowance | None = None
) -> forms.Form:
    """Inverse of :func:`pack`; raises :class:`ArtifactError` for anything inconsistent.

    Parameters
    ----------
    allowance
        Memory that it may take; by default a limit from the shape.
    """
    allowance = allowance or allowance_for(shape)
    tensors = {}
    for name, entry in check_parts(parts, len(blob)).items():
        chunk = blob[entry[0] : entry[0] + entry[1]]
        if len(entry) == 2:
            tensors[name] = coding.decode(chunk, allowance=allowance)
        else:
            allowance.take(3 * len(chunk), f"part {name!r}")
            tensors[name] = _floats(name, chunk, entry[2:])
    return forms.restore(tensors, meta, shape, allowance=allowance)


def check_parts(parts: Any, size: int) -> Mapping[str, list]:
    """Check that parts are contiguous and cover a blob of ``size``, so none can be dropped or read twice."""
    end = 0
    if not isinstance(parts, dict):
        raise ArtifactError(f"the parts are {parts!r}; expected a mapping")
    for name, entry in parts.items():
        if not (isinstance(entry, list) and len(entry) >= 2 and naturals(entry[:2]) and entry[0] == end):
            raise ArtifactError(
                f"part {name!r} should begin at byte {end} and have a length, but its entry is {entry!r}"
            )
        end += entry[1]
    if end != size:
        raise ArtifactError(f"the parts end at byte {end}, expected {size}")
    return parts


def naturals(values: Iterable[Any]) -> bool:
    """Whether all are non-negative integers that fit 62 bits; JSON's true and false are not integers."""
    return all(type(value) is int and 0 <= value < 2**62 for value in values)


def is_shape(values: Any) -> bool:
    """Whether this is a list of natural numbers, at most as long as the dimensions of a tensor."""
    return isinstance(values, list) and len(values) <= MAX_DIMENSIONS and naturals(values)


def _floats(name: str, chunk: memoryview, entry: list) -> Tensor:
    dtype, shape = DTYPES.get(entry[0]) if isinstance(entry[0], str) else None, entry[1:]
    if dtype is None or not dtype.is_floating_point:
        raise ArtifactError(f"part {name!r} has unknown dtype {entry[0]!r}")
    if not is_shape(shape) or math.prod(shape) * dtype.itemsize != len(chunk):
        raise ArtifactError(f"part {name!r}: {len(chunk)} bytes do not fit shape {shape} of {entry[0]}")
    return from_bytes(chunk, dtype, shape)


def from_bytes(content: memoryview, dtype: torch.dtype, shape: Iterable[int]) -> Tensor:
    """Copy into a new tensor: bytes in a file may be unaligned and must not be changed."""
    if not len(content):
        return torch.zeros(tuple(shape), dtype=dtype)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(dtype).reshape(tuple(shape))
