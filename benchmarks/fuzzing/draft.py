"""An artifact taken apart, to be changed in memory and written with checksums that hide the change."""

from __future__ import annotations

import hashlib
import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo.artifact.configuration import is_configuration
from octavo.artifact.writing import unescaped

MANIFEST = "octavo.json"


class Inapplicable(Exception):
    """A mutation that this artifact gives no room for."""


@dataclass
class File:
    """A safetensors file: its header as JSON, or as text that need not be any, and its data."""

    header: dict[str, Any]
    data: bytes
    text: bytes | None = None

    def head(self) -> bytes:
        """Length and header."""
        text = self.text
        if text is None:
            text = json.dumps(self.header, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(text)) + text


@dataclass
class Draft:
    """What is to be written.

    Parameters
    ----------
    manifest
        Without its signature.
    text
        What stands in place of the manifest, without the signature and the brace before it.
    files, others
        Safetensors files, and all others, by their path in the folder.
    after
        Done to the folder once it is written: links and devices.
    signed
        Whether the manifest is signed again.
    """

    manifest: dict[str, Any]
    files: dict[str, File]
    others: dict[str, bytes]
    text: bytes | None = None
    after: list[Callable[[Path], Any]] = field(default_factory=list)
    signed: bool = True
    signature: bytes = b""

    @classmethod
    def read(cls, folder: Path) -> Draft:
        """Take an honest artifact apart."""
        content = (folder / MANIFEST).read_bytes()
        manifest = json.loads(content)
        signature = manifest.pop("sha256").encode()
        files, others = {}, {}
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if name in manifest["files"] and name.endswith(".safetensors"):
                whole = path.read_bytes()
                end = 8 + struct.unpack("<Q", whole[:8])[0]
                files[name] = File(json.loads(whole[8:end]), whole[end:], whole[8:end])
            elif path.is_file() and name != MANIFEST:
                others[name] = path.read_bytes()
        return cls(manifest, files, others, signature=signature)

    def write(self, folder: Path) -> None:
        """Write everything, the manifest signed if that is asked for."""
        for name, content in self.others.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        for name, file in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(file.head() + file.data)
        body = self.text or json.dumps(self.manifest, separators=(",", ":"), ensure_ascii=True)[1:].encode()
        signature = hashlib.sha256(body).hexdigest().encode() if self.signed else self.signature
        (folder / MANIFEST).write_bytes(b'{"sha256":"' + signature + b'",' + body)
        for do in self.after:
            do(folder)

    def names(self) -> list[str]:
        """Names of the tensors in the files."""
        return [name for name, *_ in self._entries()]

    def coded(self) -> list[str]:
        """Names of tensors that are coded blobs."""
        return [name for name in self.manifest["coded"] if self.content(name)]

    def content(self, name: str) -> bytes:
        """Bytes of a tensor."""
        file, entry = self._entry(name)
        start, stop = entry["data_offsets"]
        return file.data[start:stop]

    def replace(self, name: str, content: bytes) -> None:
        """Give a tensor other bytes, of any length, and sign it."""
        file, entry = self._entry(name)
        parts, at = [], 0
        entries = [item for key, item in file.header.items() if key != "__metadata__"]
        for item in sorted(entries, key=lambda item: item["data_offsets"]):
            start, stop = item["data_offsets"]
            part = content if item is entry else file.data[start:stop]
            item["data_offsets"] = [at, at + len(part)]
            if item is entry and item["dtype"] == "U8":
                item["shape"] = [len(part)]
            parts.append(part)
            at += len(part)
        file.data, file.text = b"".join(parts), None
        self.sign_tensor(name)
        self.sign_files()

    def sign_tensor(self, name: str) -> None:
        """Let the manifest state the checksum of what is there."""
        crc = zlib.crc32(self.content(name))
        if name in self.manifest["sites"]:
            self.manifest["sites"][name]["crc"] = crc
        elif name in self.manifest["coded"] or name in self.manifest["kept"]:
            self.manifest["coded" if name in self.manifest["coded"] else "kept"][name][0] = crc

    def sign_files(self) -> None:
        """Let the manifest state sizes and checksums of all files as they are."""
        for name, file in self.files.items():
            head = file.head()
            self.manifest["files"][name] = [len(head) + len(file.data), zlib.crc32(head)]

    def sign_others(self) -> None:
        """Let the manifest state sizes and checksums of configuration and indexes, as a stranger's would."""
        for name, content in self.others.items():
            stated = "files" if name.endswith(".index.json") else "configurations"
            if stated == "files" or is_configuration(name):
                self.manifest.setdefault(stated, {})[name] = [len(content), zlib.crc32(content)]

    def _entries(self) -> Iterator[tuple[str, File, dict[str, Any]]]:
        for path, file in self.files.items():
            prefix = path.rpartition("model")[0]
            for key, entry in file.header.items():
                if key != "__metadata__":
                    yield prefix + unescaped(key), file, entry

    def _entry(self, name: str) -> tuple[File, dict[str, Any]]:
        found = next(((file, entry) for key, file, entry in self._entries() if key == name), None)
        if found is None:
            raise Inapplicable(name)
        return found


Change = Callable[[Draft, random.Random], None]


@dataclass(frozen=True)
class Mutation:
    """A kind of change.

    Parameters
    ----------
    name
        ``layer: what``.
    change
        Makes one.
    alters
        Whether what is restored may be other than before, as the signed manifest then says.
    weight
        How often it is chosen beside others.
    """

    name: str
    change: Change
    alters: bool
    weight: int


MUTATIONS: dict[str, Mutation] = {}


def mutation(name: str, *, alters: bool = True, weight: int = 4) -> Callable[[Change], Change]:
    """Register a kind of change."""

    def register(change: Change) -> Change:
        assert name not in MUTATIONS, name
        MUTATIONS[name] = Mutation(name, change, alters, weight)
        return change

    return register


def pick(rng: random.Random, choices: Any) -> Any:
    """One of them, or the mutation has no room."""
    choices = list(choices)
    if not choices:
        raise Inapplicable("nothing to choose from")
    return rng.choice(choices)
