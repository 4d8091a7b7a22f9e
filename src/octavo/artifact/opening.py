"""Opening an artifact's files: the manifest, the headers of tensor files, the index of shards."""

from __future__ import annotations

import hashlib
import math
import re
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octavo.artifact.folder import check_folder
from octavo.artifact.packing import is_shape, naturals
from octavo.artifact.writing import FORMAT_VERSION, INDEX, MANIFEST, WEIGHTS, unescaped
from octavo.errors import ArtifactError
from octavo.sources.sentences import SUBFOLDER
from octavo.sources.source import DTYPES as CODES
from octavo.system.replacing import FOREIGN
from octavo.system.strict_json import parse_object, read_plain
from octavo.system.tensor_files import Place

_MANIFEST_LIMIT = 256 << 20
#: The limit of the safetensors library.
_HEADER_LIMIT = 100_000_000
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors", re.ASCII)
_PREFIX = re.compile(rb'\{"sha256":"([0-9a-f]{64})",')


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of an artifact's folder, with the folder, checksum and version checked."""
    file = path / MANIFEST
    if not path.is_dir() or not file.is_file():
        if (path / FOREIGN).is_file():
            raise ArtifactError(f"{path}: holds files for another runtime, which opens them; octavo verify checks them")
        raise ArtifactError(f"{path}: not an artifact, since it has no {MANIFEST}; name the folder that Octavo wrote")
    check_folder(path)
    content = read_plain(file, most=_MANIFEST_LIMIT)
    prefix = _PREFIX.match(content)
    if not prefix or hashlib.sha256(content[prefix.end() :]).hexdigest().encode() != prefix[1]:
        raise ArtifactError(f"{file}: damaged (checksum mismatch), or not written by Octavo; copy the artifact again")
    manifest = parse_object(content, file, extra=4 * _weights_bytes(path))
    if manifest.get("format") != "octavo" or manifest.get("version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{file}: format {manifest.get('format')!r} version {manifest.get('version')!r}; this Octavo reads version "
            f"{FORMAT_VERSION}, so use a matching version"
        )
    return manifest


def _weights_bytes(path: Path) -> int:
    """Bytes of the weight files in a folder; they bound the length of the manifest."""
    return sum(file.stat().st_size for file in path.glob("model*.safetensors") if file.is_file())


def read_headers(path: Path, files: Mapping[str, Any]) -> dict[str, Place]:
    """The location of every tensor, by name; names in a sub-folder start with it.

    Parameters
    ----------
    files
        Bytes and checksum of every file, from the manifest.

    Raises
    ------
    ArtifactError
        If a file is missing or damaged, or a loader would read other weight files.
    """
    folders: dict[str, dict[str, Any]] = {}
    for name, entry in files.items():
        folder, _, inner = name.rpartition("/")
        if folder and not SUBFOLDER.fullmatch(folder):
            raise ArtifactError(
                f"{path}: the manifest names the file {name!r}, which is not a valid place in an artifact"
            )
        if not (isinstance(entry, list) and len(entry) == 2 and naturals(entry)):
            raise ArtifactError(f"{path}: the manifest lacks the size and checksum of {name}")
        folders.setdefault(folder, {})[inner] = entry
    places: dict[str, Place] = {}
    for folder, own in folders.items():
        prefix = f"{folder}/" if folder else ""
        _check_names(path / folder, own)
        shards = {name: _read_header(path / folder / name, entry) for name, entry in own.items() if name != INDEX}
        if INDEX in own:
            _check_index(path / folder / INDEX, own[INDEX], shards)
        for name, found in shards.items():
            for tensor, place in found.items():
                if places.setdefault(prefix + tensor, place) is not place:
                    raise ArtifactError(f"{path / folder / name}: tensor {tensor!r} is also in another file")
    return places


def _check_names(folder: Path, own: Mapping[str, Any]) -> None:
    """Check that there is one file, or shards with an index, and no other weights that a loader might read."""
    shards = [_SHARD.fullmatch(name) for name in own if name != INDEX]
    whole = [(shard[1], shard[2]) for shard in shards if shard]
    wanted = [(f"{k + 1:05d}", f"{len(shards):05d}") for k in range(len(shards))]
    if set(own) != {WEIGHTS} and (sorted(whole) != wanted or INDEX not in own):
        raise ArtifactError(
            f"{folder}: the manifest names {', '.join(sorted(own))[:200]}; expected one file or all shards"
        )
    for file in (*folder.glob("model*.safetensors"), folder / INDEX):
        if file.name not in own and file.exists():
            raise ArtifactError(f"{file}: does not belong to this artifact, and loaders might read it; remove it")


def _read_header(file: Path, entry: list[int]) -> dict[str, Place]:
    """The locations of the tensors of a file, which must be contiguous."""
    if not file.is_file():
        raise ArtifactError(f"{file}: missing, or not a regular file; copy the artifact again")
    if file.stat().st_size != entry[0]:
        raise ArtifactError(
            f"{file}: has {file.stat().st_size} bytes, but the manifest says {entry[0]}; it may be truncated, so copy "
            "the artifact again"
        )
    with open(file, "rb") as opened:
        head = opened.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if 2 <= length <= min(entry[0] - 8, _HEADER_LIMIT):
            head += opened.read(length)
    if len(head) != 8 + length or zlib.crc32(head) != entry[1]:
        raise ArtifactError(f"{file}: the header is damaged (checksum mismatch); copy the artifact again")
    places: dict[str, Place] = {}
    spans: list[tuple[int, int]] = []
    size_of_data = entry[0] - len(head)
    header = parse_object(head[8:], file, extra=4 * entry[0])
    if header.pop("__metadata__", {"format": "pt"}) != {"format": "pt"}:
        raise ArtifactError(f"{file}: the header's metadata were not written by Octavo")
    for inner, info in header.items():
        tensor = unescaped(inner)
        try:
            dtype, shape, (start, stop) = CODES[info["dtype"]], info["shape"], info["data_offsets"]
            whole = is_shape(shape) and naturals((start, stop)) and start <= stop <= size_of_data
            fits = whole and stop - start == math.prod(shape) * dtype.itemsize
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{file}: the entry of {tensor!r} is malformed: {error}") from error
        if not fits or tensor in places:
            raise ArtifactError(f"{file}: the entry of {tensor!r} does not fit the file")
        places[tensor] = Place(file, len(head) + start, dtype, tuple(shape), ArtifactError)
        spans.append((start, stop))
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ArtifactError(f"{file}: tensors overlap or have gaps at byte {min(start, end)}")
        end = stop
    if end != size_of_data:
        raise ArtifactError(f"{file}: tensors end at byte {end} of {size_of_data}")
    return places


def _check_index(file: Path, entry: list[int], shards: Mapping[str, Mapping[str, Place]]) -> None:
    """Check that the index names the right shard of every tensor, since loaders trust it."""
    content = read_plain(file, most=_HEADER_LIMIT)
    if [len(content), zlib.crc32(content)] != entry:
        raise ArtifactError(f"{file}: damaged (checksum mismatch); copy the artifact again")
    said = parse_object(content, file, extra=4 * len(content)).get("weight_map")
    held = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    if not isinstance(said, dict) or {unescaped(tensor): name for tensor, name in said.items()} != held:
        raise ArtifactError(f"{file}: does not match the tensors of the shards; copy the artifact again")
