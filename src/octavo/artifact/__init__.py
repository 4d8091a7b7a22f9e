"""Artifacts: packed forms in safetensors files, and a manifest that says how to read them.

``docs/format.md`` describes the files byte by byte.
"""

from octavo.artifact.packing import Packed, Sized, StoredBytes, dtype_name, pack, unpack
from octavo.artifact.reading import Artifact
from octavo.artifact.writing import FORMAT_VERSION, MANIFEST, WEIGHTS, Contents, Entry, Kept, is_constant

__all__ = [
    "FORMAT_VERSION", "MANIFEST", "WEIGHTS", "Artifact", "Contents", "Entry", "Kept", "Packed", "Sized", "StoredBytes",
    "dtype_name", "is_constant", "pack", "unpack",
]  # fmt: skip
