"""Opening an artifact's files: the manifest, the headers of the files with tensors, the index of shards."""

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
from octavo.sources.sites import DTYPES as CODES
from octavo.system.strict_json import parse_object, read_plain
from octavo.system.tensor_files import Place

_MANIFEST_LIMIT = 256 << 20
#: That of the safetensors library.
_HEADER_LIMIT = 100_000_000
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors", re.ASCII)
_PREFIX = re.compile(rb'\{"sha256":"([0-9a-f]{64})",')


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of an artifact's folder, which holds nothing but ordinary files; checksum and version verified."""
    file = path / MANIFEST
    if not path.is_dir() or not file.is_file():
        raise ArtifactError(f"{path}: not an artifact, there is no {MANIFEST} in it")
    check_folder(path)
    content = read_plain(file, most=_MANIFEST_LIMIT)
    prefix = _PREFIX.match(content)
    if not prefix or hashlib.sha256(content[prefix.end() :]).hexdigest().encode() != prefix[1]:
        raise ArtifactError(f"{file}: damaged (checksum mismatch), or not written by Octavo")
    manifest = parse_object(content, file, extra=4 * _weights_bytes(path))
    if manifest.get("format") != "octavo" or manifest.get("version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{file}: format {manifest.get('format')!r} version {manifest.get('version')!r}; "
            f"this Octavo reads version {FORMAT_VERSION}"
        )
    return manifest


def _weights_bytes(path: Path) -> int:
    """Bytes of the files with weights that lie in a folder: the more there are, the longer a manifest may be."""
    return sum(file.stat().st_size for file in path.glob("model*.safetensors") if file.is_file())


def read_headers(path: Path, files: Mapping[str, Any]) -> dict[str, Place]:
    """Where every tensor lies, by name; those in a sub-folder are named after it.

    Parameters
    ----------
    files
        Bytes and checksum of every file, as the manifest has them.

    Raises
    ------
    ArtifactError
        If a file is missing, damaged, or not the only one that a loader would read.
    """
    folders: dict[str, dict[str, Any]] = {}
    for name, entry in files.items():
        folder, _, inner = name.rpartition("/")
        if folder and not SUBFOLDER.fullmatch(folder):
            raise ArtifactError(f"{path}: the manifest names the file {name!r}, which is in no folder of an artifact")
        if not (isinstance(entry, list) and len(entry) == 2 and naturals(entry)):
            raise ArtifactError(f"{path}: the manifest does not say size and checksum of {name}")
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
                    raise ArtifactError(f"{path / folder / name}: tensor {tensor!r} is in another file too")
    return places


def _check_names(folder: Path, own: Mapping[str, Any]) -> None:
    """One file, or shards with their index, and no other weights that a loader might take in their place."""
    shards = [_SHARD.fullmatch(name) for name in own if name != INDEX]
    whole = [(shard[1], shard[2]) for shard in shards if shard]
    wanted = [(f"{k + 1:05d}", f"{len(shards):05d}") for k in range(len(shards))]
    if set(own) != {WEIGHTS} and (sorted(whole) != wanted or INDEX not in own):
        raise ArtifactError(
            f"{folder}: the manifest names {', '.join(sorted(own))[:200]}, neither one file nor all shards"
        )
    for file in (*folder.glob("model*.safetensors"), folder / INDEX):
        if file.name not in own and file.exists():
            raise ArtifactError(f"{file}: is no part of this artifact, and loaders might read it; remove it")


def _read_header(file: Path, entry: list[int]) -> dict[str, Place]:
    """Where the tensors of a file lie: one after another, without gaps."""
    if not file.is_file():
        raise ArtifactError(f"{file}: missing, or not a plain file")
    if file.stat().st_size != entry[0]:
        raise ArtifactError(f"{file}: has {file.stat().st_size} bytes, the manifest says {entry[0]}: truncated?")
    with open(file, "rb") as opened:
        head = opened.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if 2 <= length <= min(entry[0] - 8, _HEADER_LIMIT):
            head += opened.read(length)
    if len(head) != 8 + length or zlib.crc32(head) != entry[1]:
        raise ArtifactError(f"{file}: the header is damaged (checksum mismatch)")
    places: dict[str, Place] = {}
    spans: list[tuple[int, int]] = []
    size_of_data = entry[0] - len(head)
    header = parse_object(head[8:], file, extra=4 * entry[0])
    if header.pop("__metadata__", {"format": "pt"}) != {"format": "pt"}:
        raise ArtifactError(f"{file}: the header's metadata are not those that Octavo writes")
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
            raise ArtifactError(f"{file}: tensors overlap, or leave bytes between them, at byte {min(start, end)}")
        end = stop
    if end != size_of_data:
        raise ArtifactError(f"{file}: tensors end at byte {end} of {size_of_data}")
    return places


def _check_index(file: Path, entry: list[int], shards: Mapping[str, Mapping[str, Place]]) -> None:
    """The index must name every tensor in the shard that it is in: loaders believe it."""
    content = read_plain(file, most=_HEADER_LIMIT)
    if [len(content), zlib.crc32(content)] != entry:
        raise ArtifactError(f"{file}: damaged (checksum mismatch); copy the artifact again")
    said = parse_object(content, file, extra=4 * len(content)).get("weight_map")
    held = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    if not isinstance(said, dict) or {unescaped(tensor): name for tensor, name in said.items()} != held:
        raise ArtifactError(f"{file}: does not name the tensors of the shards; copy the artifact again")
