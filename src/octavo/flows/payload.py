"""The frame of every payload: its plan, its step, and its parts, checked before anything is decoded.

Magic, version, number of parts, digest of the plan, step and CRC-32 come first, then the length of every part, then the
parts. All numbers are little-endian; the checksum covers everything but itself.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from itertools import pairwise

from octavo.errors import ArtifactError
from octavo.flows.flow_plan import FlowPlan

_MAGIC, _VERSION = b"OctF", 1
_HEAD = struct.Struct("<4sBB8sII")
_CRC = 4
_LENGTH = struct.Struct("<I")


def overhead(parts: int) -> int:
    """Bytes that a payload of so many parts has beside them."""
    return _HEAD.size + parts * _LENGTH.size


def seal(plan: FlowPlan, step: int, parts: Sequence[bytes]) -> bytes:
    """A payload of some parts, each at most 4 GB."""
    lengths = b"".join(_LENGTH.pack(len(part)) for part in parts)
    head = _HEAD.pack(_MAGIC, _VERSION, len(parts), plan.digest, step, 0)[:-_CRC]
    checksum = zlib.crc32(lengths, zlib.crc32(head))
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return b"".join([head, checksum.to_bytes(_CRC, "little"), lengths, *parts])


def unseal(payload: bytes, plan: FlowPlan, step: int, count: int) -> list[memoryview]:
    """The parts of a payload.

    Parameters
    ----------
    step
        The step that the receiver waits for.
    count
        How many parts it has.

    Raises
    ------
    ArtifactError
        If the payload is damaged, of another plan, or not the one that is waited for.
    """
    view = memoryview(payload)
    start = overhead(count)
    if len(view) < start:
        raise ArtifactError(f"payload: {len(view)} bytes are too few for {count} parts; send it again")
    magic, version, parts, digest, sent, checksum = _HEAD.unpack(view[: _HEAD.size])
    if magic != _MAGIC or version != _VERSION:
        raise ArtifactError(f"payload: not one of version {_VERSION}; sender and receiver need the same Octavo")
    if zlib.crc32(view[_HEAD.size :], zlib.crc32(view[: _HEAD.size - _CRC])) != checksum:
        raise ArtifactError("payload: its checksum does not match; send it again")
    if digest != plan.digest:
        raise ArtifactError("payload: it belongs to another plan; send the plan of this model and flow first")
    if sent != step:
        lost = "one before it was lost" if sent > step else "it was received before"
        raise ArtifactError(f"payload: it is that of step {sent}, and step {step} is waited for: {lost}")
    lengths = [length for (length,) in _LENGTH.iter_unpack(view[_HEAD.size : start])]
    if parts != count or start + sum(lengths) != len(view):
        raise ArtifactError(f"payload: {parts} parts of {sum(lengths)} bytes, expected {count} of {len(view) - start}")
    ends = [start]
    for length in lengths:
        ends.append(ends[-1] + length)
    return [view[first:last] for first, last in pairwise(ends)]
