"""Kept work with a checksum over its content and place, so that damaged or swapped files are never used."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: The file that names the job of the work in a folder.
JOB = "job.json"
_PREFIX = re.compile(rb'\{"sha256":"([0-9a-f]{64})",?')


def digest(place: str, *content: bytes | memoryview) -> bytes:
    """SHA-256 of a content and its place."""
    total = hashlib.sha256(f"{len(place)} {place}".encode())
    for part in content:
        total.update(part)
    return total.digest()


def place_in(folder: Path, name: str) -> str:
    """The place of a file in its checksum: its name, and the job of its folder, if any."""
    try:
        with open(folder / JOB, "rb") as file:
            match = _PREFIX.match(file.read(128))
    except OSError:
        match = None
    return f"{match[1].decode() if match and name != JOB else ''} {name}"


def sealed_json(folder: Path, name: str, value: Mapping[str, Any]) -> bytes:
    """A mapping as JSON whose first entry is the checksum of the rest."""
    text = json.dumps(value).encode()
    return b'{"sha256":"' + digest(place_in(folder, name), text).hex().encode() + b'",'[: 1 + bool(value)] + text[1:]


def unsealed_json(folder: Path, name: str, content: bytes) -> dict[str, Any]:
    """Inverse of :func:`sealed_json`; raises ValueError if anything was changed."""
    match = _PREFIX.match(content)
    text = b"{" + content[match.end() :] if match else b""
    if match is None or digest(place_in(folder, name), text).hex().encode() != match[1]:
        raise ValueError("checksum mismatch, or written by another version of Octavo")
    return dict(json.loads(text))
