"""Writing artifacts: first the sizes, then the content with one tensor in memory at a time.

Headers and the manifest depend only on names, shapes, lengths and checksums. So the exact bytes of an artifact are
known before it is written, and files are written from front to back.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo import coding
from octavo.artifact.configuration import listed
from octavo.artifact.deltas import Delta
from octavo.artifact.packing import Packed, dtype_name
from octavo.coding.container import DTYPES as INTEGERS
from octavo.coding.container import MAX_DIMENSIONS
from octavo.errors import RequestError
from octavo.sources.sentences import split_name
from octavo.sources.sites import Layout
from octavo.system.raw import raw_bytes
from octavo.system.replacing import MANIFEST
from octavo.system.version import __version__

FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
#: Larger artifacts are split into shards up to this size.
SHARD_BYTES = 4_000_000_000

#: The safetensors names of the dtypes in artifacts, in its order of writing, which keeps all aligned.
_CODES = {
    torch.uint64: "U64", torch.float64: "F64", torch.complex64: "C64", torch.float32: "F32", torch.uint32: "U32",
    torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.uint8: "U8",
}  # fmt: skip
#: A constant float tensor is coded if it has more bytes than this; a coded one has about 30.
_CONSTANT_BYTES = 40
#: Integer dtypes as which the bits of other tensors are coded.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
#: The reserved name of safetensors files.
_RESERVED = "__metadata__"


@dataclass
class Entry:
    """A site's packed form, and the layout that turns its matrix back into a tensor."""

    packed: Packed
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: Layout

    def describe(self) -> dict[str, Any]:
        """The manifest entry."""
        entry: dict[str, Any] = {
            "shape": list(self.shape),
            "dtype": dtype_name(self.dtype),
            "form": self.packed.meta,
            "parts": self.packed.parts,
            "crc": self.packed.crc,
        }
        if self.layout != Layout():
            exponent = [self.layout.exponent] if self.layout.exponent else []
            entry["layout"] = [self.layout.kind, self.layout.groups, *exponent]
        return entry


@dataclass
class Kept:
    """A tensor that is not a site.

    Parameters
    ----------
    read
        Returns the tensor as in the source.
    shape
        Its shape.
    stored
        The dtype to store.
    dtype
        The dtype to restore, that of the source.
    coded
        Whether its bits are coded as integers. This is always so for dtypes without a name in files.
    """

    read: Callable[[], Tensor]
    shape: tuple[int, ...]
    stored: torch.dtype
    dtype: torch.dtype
    coded: bool = False

    @property
    def is_integer(self) -> bool:
        """Whether it is an integer tensor and coded as such."""
        return self.stored in INTEGERS

    @property
    def is_raw(self) -> bool:
        """Whether it is stored uncoded."""
        return not self.is_integer and not self.coded and self.stored in _CODES

    def tensor(self) -> Tensor:
        """The tensor in its stored dtype."""
        return self.read().detach().cpu().to(self.stored)

    def given(self) -> Tensor:
        """The tensor as restored from the artifact."""
        return self.tensor().to(self.dtype)

    def content(self) -> bytes | memoryview:
        """The stored bytes: floats raw, integers and bits coded."""
        tensor = self.tensor()
        if self.is_raw:
            return raw_bytes(tensor)
        return coding.encode(tensor if self.is_integer else bits_of(tensor))

    @cached_property
    def measured(self) -> tuple[int, int]:
        """Length and CRC-32 of the content."""
        content = self.content()
        return len(content), zlib.crc32(content)


def is_constant(tensor: Tensor) -> bool:
    """Whether all elements of a float tensor have the same bits, and coding them saves bytes."""
    if tensor.nbytes <= _CONSTANT_BYTES or not tensor.is_floating_point() or tensor.itemsize not in BITS:
        return False
    low, high = torch.aminmax(bits_of(tensor))
    return bool(low == high)


@dataclass(frozen=True)
class _Piece:
    """A tensor of a safetensors file: its header entry and the source of its bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    content: Callable[[], bytes | memoryview]

    @property
    def length(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _File:
    """A file to write: the bytes of its head, followed by the pieces."""

    head: bytes
    pieces: tuple[_Piece, ...] = ()

    @property
    def bytes(self) -> int:
        return len(self.head) + sum(piece.length for piece in self.pieces)


@dataclass
class Contents:
    """Everything that goes into an artifact.

    Parameters
    ----------
    source
        ``title``, ``fingerprint``, ``bytes`` and ``weights`` of the source.
    entries
        Sites by name.
    kept
        Tensors that are not sites, by name.
    aliases
        Maps further names of tensors to the names under which they are stored.
    named
        Aliases that also appear in the files without content, for loaders that do not tie them.
    resident
        Bytes of all tensors while the model runs packed, if that was the budget.
    extra
        Plain data by name that the source stores with its tensors.
    configurations
        Contents of the configuration files by relative path. They are written with the other companions; the manifest
        holds their checksums.
    unfilled
        Parameter names of the source's model that no tensor fills; None if its model is unknown.
    reshaped
        Whether units were cut so that no config says the shapes of all tensors: a loader takes them from the files.
    delta
        The base, if entries and kept tensors are differences to it.
    """

    source: dict[str, Any]
    entries: dict[str, Entry] = field(default_factory=dict)
    kept: dict[str, Kept] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    resident: int | None = None
    named: frozenset[str] = frozenset()
    extra: dict[str, Any] = field(default_factory=dict)
    configurations: Mapping[str, bytes] = field(default_factory=dict)
    unfilled: Sequence[str] | None = None
    reshaped: bool = False
    delta: Delta | None = None

    @property
    def is_plain(self) -> bool:
        """Whether every loader of safetensors files reads them as they are: nothing is encoded."""
        own = self.entries or self.named or self.reshaped or self.delta
        return not own and all(kept.is_raw for kept in self.kept.values())

    @property
    def bytes(self) -> int:
        """Artifact bytes, exactly."""
        return sum(file.bytes for file in self._files().values())

    def write(self, folder: Path, progress: Callable[[int, int], Any] = lambda done, total: None) -> None:
        """Write every file that counts, and flush it to disk.

        Parameters
        ----------
        progress
            Called with the number of bytes written and their total.
        """
        files = self._files()
        done, total = 0, sum(file.bytes for file in files.values())
        for name, file in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            with open(folder / name, "wb") as out:
                out.write(file.head)
                for piece in file.pieces:
                    out.write(piece.content())
                    done += piece.length
                    progress(done, total)
                out.flush()
                os.fsync(out.fileno())

    def _files(self) -> dict[str, _File]:
        manifest: dict[str, Any] = {
            "format": "octavo", "version": FORMAT_VERSION, "octavo": __version__, "source": self.source,
            "aliases": self.aliases, "files": {}, "sites": {}, "kept": {}, "coded": {},
        }  # fmt: skip
        if self.resident is not None:
            manifest["resident"] = self.resident
        if self.extra:
            manifest["extra"] = self.extra
        if self.configurations:
            manifest["configurations"] = listed(self.configurations)
        if self.unfilled is not None:
            manifest["unfilled"] = sorted(self.unfilled)
        if self.reshaped:
            manifest["reshaped"] = True
        if self.delta is not None:
            manifest["base"] = self.delta.describe()
        shapes = {name: tensor.shape for tensors in (self.entries, self.kept) for name, tensor in tensors.items()}
        for name, shape in shapes.items():
            if len(shape) > MAX_DIMENSIONS:
                raise RequestError(
                    f"tensor {name!r} has {len(shape)} dimensions; an artifact holds tensors of at most "
                    f"{MAX_DIMENSIONS}, so reshape it"
                )
        pieces: dict[str, _Piece] = {}
        for name, entry in self.entries.items():
            pieces[name] = _Piece(torch.uint8, (entry.packed.bytes,), entry.packed.read)
            manifest["sites"][name] = entry.describe()
        for name, kept in self.kept.items():
            length, crc = kept.measured
            if kept.is_raw:
                pieces[name] = _Piece(kept.stored, kept.shape, kept.content)
                manifest["kept"][name] = [crc, dtype_name(kept.dtype)]
                continue
            pieces[name] = _Piece(torch.uint8, (length,), kept.content)
            manifest["coded"][name] = [crc, *kept.shape]
            if not kept.is_integer:
                manifest.setdefault("bits", {})[name] = [dtype_name(kept.stored), dtype_name(kept.dtype)]
        for alias in sorted({*self.named, *(self.delta.same if self.delta else ())}):
            pieces[alias] = _Piece(torch.uint8, (0,), lambda: b"")
        files = _by_folder(pieces)
        for name, file in files.items():
            manifest["files"][name] = [file.bytes, zlib.crc32(file.head)]
        body = json.dumps(manifest, separators=(",", ":"), ensure_ascii=True)[1:].encode()
        head = b'{"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'",' + body
        return {**files, MANIFEST: _File(head)}


def _by_folder(pieces: Mapping[str, _Piece]) -> dict[str, _File]:
    """Files of all tensors; names that start with a sub-folder are stored there under the rest of the name."""
    folders: dict[str, dict[str, _Piece]] = {"": {}}
    for name, piece in pieces.items():
        folder, inner = split_name(name)
        folders.setdefault(folder, {})[inner] = piece
    result: dict[str, _File] = {}
    for folder, own in folders.items():
        if own or len(folders) == 1:
            result.update((folder + name, file) for name, file in _shards(own).items())
    return result


def bits_of(tensor: Tensor) -> Tensor:
    """The bits of a tensor's elements in row-major order, as a 1-d integer tensor."""
    plain = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
    return plain.view(BITS.get(tensor.dtype.itemsize, torch.int64))


def escaped(name: str) -> str:
    """The name of a tensor in a safetensors file, changed if the format reserves the name."""
    return f"{name}." if name.rstrip(".") == _RESERVED else name


def unescaped(name: str) -> str:
    """Inverse of :func:`escaped`."""
    return name[:-1] if name.endswith(".") and name.rstrip(".") == _RESERVED else name


def _shards(pieces: Mapping[str, _Piece]) -> dict[str, _File]:
    shards: list[dict[str, _Piece]] = [{}]
    size = 0
    for name, piece in pieces.items():
        if size and size + piece.length > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = piece
        size += piece.length
    if len(shards) == 1:
        return {WEIGHTS: _safetensors(shards[0])}
    names = [f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors" for index in range(len(shards))]
    where = {escaped(tensor): name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = json.dumps({"metadata": {}, "weight_map": where}, separators=(",", ":")).encode()
    files = {name: _safetensors(shard) for name, shard in zip(names, shards, strict=True)}
    return {**files, INDEX: _File(index)}


def _safetensors(pieces: Mapping[str, _Piece]) -> _File:
    """Same bytes as from the safetensors library, which needs all tensors in memory."""
    order = sorted(pieces, key=lambda name: (list(_CODES).index(pieces[name].dtype), escaped(name).encode()))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in order:
        piece = pieces[name]
        stop = start + piece.length
        header[escaped(name)] = {"dtype": _CODES[piece.dtype], "shape": piece.shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return _File(len(text).to_bytes(8, "little") + text, tuple(pieces[name] for name in order))
