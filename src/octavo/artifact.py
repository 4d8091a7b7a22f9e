"""Artifacts: packed forms in safetensors files, and a manifest that says how to read them.

An artifact comes from anybody. Reading one therefore trusts nothing: the manifest's and every tensor's checksum are
verified, names of files may not leave the folder, shapes are bounded by the bytes that are there before memory is
taken, and nothing is ever executed. ``docs/format.md`` describes the files byte by byte.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

import octavo.forms as forms
from octavo import coding
from octavo.errors import ArtifactError
from octavo.raw import narrowed, raw_bytes
from octavo.sites import Layout

FORMAT_VERSION = 1
MANIFEST = "octavo.json"
WEIGHTS = "model.safetensors"
#: Larger artifacts are split into shards of at most this size.
SHARD_BYTES = 4_000_000_000

#: Decoded weights may take this many times the bytes of the artifact; no artifact worth loading comes near it.
_LARGEST_RATIO = 2000
_SLACK = 64 << 20
_MANIFEST_LIMIT = 256 << 20
_FILE_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_PREFIX = re.compile(rb'\{"sha256":"([0-9a-f]{64})",')

_DTYPES = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
_SAFETENSORS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Packed:
    """A form as bytes.

    Parameters
    ----------
    blob
        All parts, one after another.
    parts
        Part name to ``[offset, length]`` for coded integers, or ``[offset, length, dtype, *shape]`` for floats.
    meta
        The form's manifest entry.
    codecs
        Bytes by codec, for the report.
    """

    blob: bytes
    parts: dict[str, list]
    meta: dict[str, Any]
    codecs: dict[str, int]

    @property
    def bytes(self) -> int:
        """Stored bytes of the content; its share of manifest and header is counted with the artifact."""
        return len(self.blob)


def pack(form: forms.Form) -> Packed:
    """Code all parts of a form, each integer tensor by whichever codec is smallest."""
    chunks, parts, codecs, offset = [], {}, dict[str, int](), 0
    for name, tensor in form.tensors().items():
        if tensor.dtype.is_floating_point:
            chunk = raw_bytes(tensor).tobytes()
            parts[name] = [offset, len(chunk), dtype_name(tensor.dtype), *tensor.shape]
            codec = "raw"
        else:
            chunk = coding.encode(tensor.cpu())
            parts[name] = [offset, len(chunk)]
            codec = coding.describe(chunk).codec
        codecs[codec] = codecs.get(codec, 0) + len(chunk)
        chunks.append(chunk)
        offset += len(chunk)
    return Packed(b"".join(chunks), parts, form.meta(), codecs)


def unpack(blob: memoryview, parts: Any, meta: Any, shape: tuple[int, int]) -> forms.Form:
    """Inverse of :func:`pack`; anything that does not fit is an :class:`ArtifactError`."""
    # All parts together; every form there is stays far below.
    left = 8 * (math.prod(shape) + sum(shape)) + 4096
    tensors = {}
    for name, entry in _check_parts(parts, len(blob)).items():
        chunk = blob[entry[0] : entry[0] + entry[1]]
        tensors[name] = coding.decode(chunk, max_elements=left) if len(entry) == 2 else _floats(name, chunk, entry[2:])
        left -= tensors[name].numel()
    return forms.restore(tensors, meta, shape)


def _check_parts(parts: Any, size: int) -> Mapping[str, list]:
    """Parts lie one after another and leave out no byte of a blob of ``size``: so none can be dropped or read twice."""
    end = 0
    if not isinstance(parts, dict):
        raise ArtifactError(f"the parts are {parts!r}, not a mapping")
    for name, entry in parts.items():
        if not (isinstance(entry, list) and len(entry) >= 2 and _naturals(entry[:2]) and entry[0] == end):
            raise ArtifactError(f"part {name!r} should begin at byte {end} and have a length, it says {entry!r}")
        end += entry[1]
    if end != size:
        raise ArtifactError(f"the parts end at byte {end} of {size}")
    return parts


def _naturals(values: Iterable[Any]) -> bool:
    """Whether all are integers of at least zero that fit 62 bits; JSON's true and false are none."""
    return all(type(value) is int and 0 <= value < 2**62 for value in values)


def _floats(name: str, chunk: memoryview, entry: list) -> Tensor:
    dtype, shape = _DTYPES.get(entry[0]) if isinstance(entry[0], str) else None, entry[1:]
    if dtype is None or not dtype.is_floating_point:
        raise ArtifactError(f"part {name!r} has unknown dtype {entry[0]!r}")
    if not _naturals(shape) or math.prod(shape) * dtype.itemsize != len(chunk):
        raise ArtifactError(f"part {name!r}: {len(chunk)} bytes do not hold shape {shape} of {entry[0]}")
    return _from_bytes(chunk, dtype, shape)


def _from_bytes(content: memoryview, dtype: torch.dtype, shape: Iterable[int]) -> Tensor:
    """A tensor of its own: bytes in a file need not be aligned, and the mapping is closed after loading."""
    if not len(content):
        return torch.zeros(tuple(shape), dtype=dtype)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(dtype).reshape(tuple(shape))


@dataclass
class Entry:
    """A site's packed form and how to turn its matrix back into a tensor."""

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
            "crc": zlib.crc32(self.packed.blob),
        }
        if self.layout != Layout():
            entry["layout"] = [self.layout.kind, self.layout.groups]
        return entry


@dataclass
class Contents:
    """Everything that goes into an artifact.

    Parameters
    ----------
    entries
        Sites by name.
    kept
        Tensors stored as they are or in a narrower dtype, with the dtype to give back.
    """

    source: dict[str, Any]
    entries: dict[str, Entry] = field(default_factory=dict)
    kept: dict[str, tuple[Tensor, torch.dtype]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)

    def files(self) -> dict[str, bytes]:
        """The exact bytes of every file that counts."""
        from octavo import __version__

        tensors: dict[str, Tensor] = {}
        manifest: dict[str, Any] = {
            "format": "octavo", "version": FORMAT_VERSION, "octavo": __version__, "source": self.source,
            "aliases": self.aliases, "files": {}, "sites": {}, "kept": {}, "coded": {},
        }  # fmt: skip
        for name, entry in self.entries.items():
            tensors[name] = torch.frombuffer(bytearray(entry.packed.blob), dtype=torch.uint8)
            manifest["sites"][name] = entry.describe()
        for name, (tensor, dtype) in self.kept.items():
            if tensor.dtype.is_floating_point:
                tensors[name] = tensor.contiguous()
                manifest["kept"][name] = [zlib.crc32(raw_bytes(tensor)), dtype_name(dtype)]
            else:
                blob = coding.encode(tensor)
                tensors[name] = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
                manifest["coded"][name] = [zlib.crc32(blob), *tensor.shape]
        files = _shards(tensors)
        for name, content in files.items():
            if name.endswith(".safetensors"):
                header = 8 + struct.unpack("<Q", content[:8])[0]
                manifest["files"][name] = [len(content), zlib.crc32(content[:header])]
        body = json.dumps(manifest, separators=(",", ":"), ensure_ascii=True)[1:].encode()
        return {**files, MANIFEST: b'{"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'",' + body}

    @property
    def bytes(self) -> int:
        """Artifact bytes, exactly."""
        return sum(map(len, self.files().values()))


def _shards(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        width = tensor.numel() * tensor.element_size()
        if size and size + width > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += width
    if len(shards) == 1:
        return {WEIGHTS: save_safetensors(shards[0], {"format": "pt"})}
    names = [f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors" for index in range(len(shards))]
    files = {name: save_safetensors(shard, {"format": "pt"}) for name, shard in zip(names, shards, strict=True)}
    where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = json.dumps({"metadata": {}, "weight_map": where}, separators=(",", ":"))
    return {**files, f"{WEIGHTS}.index.json": index.encode()}


class Artifact:
    """An artifact on disk, opened for reading.

    Raises
    ------
    ArtifactError
        If anything about it is damaged, unknown or implausible.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = _read_manifest(self.path)
        self._tensors: dict[str, tuple[memoryview, torch.dtype, tuple[int, ...]]] = {}
        for name, entry in _mapping(self.manifest, "files").items():
            self._open(name, entry)
        self.sites: Mapping[str, Any] = _mapping(self.manifest, "sites")
        self.kept: Mapping[str, Any] = _mapping(self.manifest, "kept")
        self.coded: Mapping[str, Any] = _mapping(self.manifest, "coded")
        self.aliases: Mapping[str, Any] = _mapping(self.manifest, "aliases")
        named = [*self.sites, *self.kept, *self.coded]
        if set(named) != set(self._tensors) or len(named) != len(self._tensors):
            odd = sorted(set(named) ^ set(self._tensors))[:3]
            raise ArtifactError(f"{self.path}: manifest and files do not name the same tensors once: {', '.join(odd)}")
        for alias, name in self.aliases.items():
            if not isinstance(name, str) or name not in self._tensors or alias in self._tensors:
                raise ArtifactError(f"{self.path}: {alias!r} cannot be tied to {name!r}")
        self._check_entries()

    @property
    def bytes(self) -> int:
        """Bytes of every file needed to restore the weights, by ``stat``."""
        return sum(file.stat().st_size for file in self.files())

    def files(self) -> list[Path]:
        """The files that count."""
        names = [MANIFEST, *self.manifest["files"]]
        index = f"{WEIGHTS}.index.json"
        return [self.path / name for name in (*names, *([index] if (self.path / index).exists() else []))]

    def names(self) -> list[str]:
        """Names of all stored tensors, tied ones under one name."""
        return list(self._tensors)

    def form(self, name: str) -> forms.Form:
        """The form of a site, checksum verified."""
        entry = self.sites[name]
        matrix = _layout(name, entry).matrix_shape(_shape(name, entry))
        content = self._content(name, entry.get("crc"))
        try:
            return unpack(content, entry["parts"], entry["form"], matrix)
        except ArtifactError as error:
            raise ArtifactError(f"{self.path}: site {name!r}: {error}") from error

    def tensor(self, name: str) -> Tensor:
        """A tensor as the source had it: shape, dtype and name."""
        if name in self.sites:
            entry = self.sites[name]
            matrix = self.form(name).dense()
            weight = _layout(name, entry).from_matrix(matrix, _shape(name, entry))
            return narrowed(weight, _dtype(name, entry.get("dtype")))
        if name in self.coded:
            crc, *shape = self.coded[name]
            tensor = coding.decode(self._content(name, crc), max_elements=math.prod(shape))
            if list(tensor.shape) != shape:
                raise ArtifactError(f"{self.path}: {name!r} decodes to shape {list(tensor.shape)}, not {shape}")
            return tensor
        crc, dtype = self.kept[name]
        content, stored, shape = self._content(name, crc), *self._tensors[name][1:]
        return _from_bytes(content, stored, shape).to(_dtype(name, dtype))

    def state(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """All tensors, tied ones as one tensor under each of their names. Sites are decoded in parallel."""
        # Largest first, so that no thread is left alone with the largest at the end.
        order = sorted(self._tensors if names is None else names, key=lambda name: -len(self._tensors[name][0]))
        threads = torch.get_num_threads()
        # One thread a site: operations that split themselves over threads again would wait for each other.
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            tensors = dict(zip(order, pool.map(self.tensor, order), strict=True))
        torch.set_num_threads(threads)
        return {**tensors, **{alias: tensors[name] for alias, name in self.aliases.items() if name in tensors}}

    def _open(self, name: str, entry: Any) -> None:
        if not _FILE_NAME.fullmatch(name):
            raise ArtifactError(f"{self.path}: the manifest names the file {name!r}; only model*.safetensors are read")
        file = self.path / name
        if not (isinstance(entry, list) and len(entry) == 2 and _naturals(entry)):
            raise ArtifactError(f"{self.path}: the manifest does not say size and checksum of {name}")
        if file.is_symlink() or not file.is_file():
            raise ArtifactError(f"{file}: missing, or not a plain file")
        if file.stat().st_size != entry[0]:
            raise ArtifactError(f"{file}: has {file.stat().st_size} bytes, the manifest says {entry[0]}: truncated?")
        # An empty file cannot be mapped.
        content = memoryview(np.memmap(file, np.uint8, mode="r") if entry[0] else b"")  # type: ignore[arg-type]
        length = struct.unpack("<Q", content[:8])[0] if len(content) >= 8 else 0
        if not 2 <= length <= len(content) - 8 or zlib.crc32(content[: 8 + length]) != entry[1]:
            raise ArtifactError(f"{file}: the header is damaged (checksum mismatch)")
        data = content[8 + length :]
        for tensor, info in _json(bytes(content[8 : 8 + length]), file).items():
            if tensor == "__metadata__":
                continue
            try:
                dtype, shape, (start, stop) = _SAFETENSORS[info["dtype"]], tuple(info["shape"]), info["data_offsets"]
                whole = _naturals((start, stop, *shape)) and start <= stop <= len(data)
                fits = whole and stop - start == math.prod(shape) * dtype.itemsize
            except (KeyError, TypeError, ValueError) as error:
                raise ArtifactError(f"{file}: the entry of {tensor!r} is malformed: {error}") from error
            if not fits or tensor in self._tensors:
                raise ArtifactError(f"{file}: the entry of {tensor!r} does not fit the file")
            self._tensors[tensor] = (data[start:stop], dtype, shape)

    def _content(self, name: str, crc: Any) -> memoryview:
        content = self._tensors[name][0]
        if zlib.crc32(content) != crc:
            raise ArtifactError(f"{self.path}: tensor {name!r} is damaged (checksum mismatch); copy the artifact again")
        return content

    def _check_entries(self) -> None:
        """Refuse what is malformed, or implausibly larger than the artifact, before any memory is taken."""
        source = _mapping(self.manifest, "source")
        sizes = [source.get(key) for key in ("bytes", "weights")]
        words = [self.manifest.get("octavo"), *(source.get(key) for key in ("title", "fingerprint"))]
        if not (_naturals(sizes) and all(sizes)) or not all(isinstance(word, str) for word in words):
            raise ArtifactError(f"{self.path}: the manifest does not say what was compressed, and with which version")
        total = 0
        for name, entry in self.sites.items():
            shape = _shape(name, entry)
            _layout(name, entry)
            if not _dtype(name, entry.get("dtype")).is_floating_point:
                raise ArtifactError(f"{self.path}: site {name!r} has dtype {entry['dtype']}; weights are floats")
            kind = entry["form"].get("form") if isinstance(entry.get("form"), dict) else None
            if not isinstance(kind, str) or kind not in forms.form_names():
                raise ArtifactError(f"{self.path}: site {name!r} has the unknown form {kind!r}")
            try:
                _check_parts(entry.get("parts"), len(self._tensors[name][0]))
            except ArtifactError as error:
                raise ArtifactError(f"{self.path}: site {name!r}: {error}") from error
            total += math.prod(shape) * 4
        for name, entry in self.coded.items():
            if not isinstance(entry, list) or not entry or not _naturals(entry):
                raise ArtifactError(f"{self.path}: the manifest entry of {name!r} is malformed")
            total += math.prod(entry[1:]) * 8
        for name, entry in self.kept.items():
            if not isinstance(entry, list) or len(entry) != 2:
                raise ArtifactError(f"{self.path}: the manifest entry of {name!r} is malformed")
            _dtype(name, entry[1])
            # Other loaders read these tensors as they are, and check nothing.
            self._content(name, entry[0])
        if total > _LARGEST_RATIO * self.bytes + _SLACK:
            raise ArtifactError(
                f"{self.path}: claims {total} bytes of weights in {self.bytes} bytes of files; refused, since no "
                f"artifact compresses {_LARGEST_RATIO} times"
            )


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not path.is_dir() or not file.is_file() or file.is_symlink():
        raise ArtifactError(f"{path}: not an artifact, there is no {MANIFEST} in it")
    if file.stat().st_size > _MANIFEST_LIMIT:
        raise ArtifactError(f"{file}: {file.stat().st_size} bytes are too many for a manifest")
    content = file.read_bytes()
    prefix = _PREFIX.match(content)
    if not prefix or hashlib.sha256(content[prefix.end() :]).hexdigest().encode() != prefix[1]:
        raise ArtifactError(f"{file}: damaged (checksum mismatch), or not written by Octavo")
    manifest = _json(content, file)
    if manifest.get("format") != "octavo" or manifest.get("version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{file}: format {manifest.get('format')!r} version {manifest.get('version')!r}; "
            f"this Octavo reads version {FORMAT_VERSION}"
        )
    return manifest


def _json(content: bytes, file: Path) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{file}: not a JSON object")
    return value


def _mapping(manifest: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = manifest.get(key)
    if not isinstance(value, dict):
        raise ArtifactError(f"the manifest has no {key!r}")
    return value


def _shape(name: str, entry: Any) -> tuple[int, ...]:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or not 2 <= len(shape) <= 8 or not _naturals(shape) or 0 in shape:
        raise ArtifactError(f"site {name!r} has shape {shape!r}")
    return tuple(shape)


def _layout(name: str, entry: Mapping[str, Any]) -> Layout:
    layout, shape = entry.get("layout", ["rows_first", 1]), _shape(name, entry)
    kind, groups = layout if isinstance(layout, list) and len(layout) == 2 else (None, 0)
    whole = _naturals([groups]) and groups > 0 and (groups == 1 or (kind == "transposed" and shape[0] % groups == 0))
    if (
        kind not in ("rows_first", "columns_first", "transposed")
        or not whole
        or (kind == "columns_first" and len(shape) != 2)
    ):
        raise ArtifactError(f"site {name!r} has layout {layout!r} for shape {list(shape)}")
    return Layout(kind, groups)


def _dtype(name: str, dtype: Any) -> torch.dtype:
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ArtifactError(f"{name!r} has dtype {dtype!r}")
    return _DTYPES[dtype]
