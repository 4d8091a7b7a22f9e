"""The state of unfinished training in a folder of work, from which a killed run goes on."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from octavo.allocation.workspace import Workspace
from octavo.system.atomic import write_file

_FACTS, _TENSORS = "recovery.json", "recovery-{}.safetensors"


def save_state(room: Workspace, number: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Keep tensors and plain facts under a number that grows; the state before is removed."""
    content = safetensors.torch.save({name: tensor.detach().contiguous() for name, tensor in tensors.items()})
    write_file(room.path / _TENSORS.format(number), content)
    room.write_json(_FACTS, {**facts, "number": number, "crc": zlib.crc32(content)})
    for old in room.path.glob(_TENSORS.format("*")):
        if old.name != _TENSORS.format(number):
            old.unlink(missing_ok=True)


def load_state(room: Workspace) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What :func:`save_state` kept last; None if there is nothing, or it is damaged, which is then noted."""
    facts = room.read_json(_FACTS, again=True)
    if facts is None:
        return None
    name = _TENSORS.format(facts["number"])
    try:
        content = (room.path / name).read_bytes()
        if zlib.crc32(content) == facts["crc"]:
            return safetensors.torch.load(content), facts
    except (OSError, SafetensorError):
        pass
    room.note_damage(name)
    return None
