"""The content of values as text: batches that come again and the knobs of a run are known by it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from octavo.system.raw import raw_bytes

_PLAIN = (type(None), str, bytes, int, float, complex, Enum, torch.dtype, torch.device)


def content(value: Any) -> str:
    """A text that is the same for equal values, in every process, and another one for others.

    Mappings, sequences and dataclasses are told by their parts, and tensors by shape, dtype and a hash of the elements.

    Raises
    ------
    TypeError
        If a value inside is of another kind, whose content is not known.

    Examples
    --------
    >>> content({"ids": [1, 2], "mask": None})
    "{'ids': [1, 2], 'mask': None}"
    """
    if isinstance(value, Tensor):
        return f"{value.dtype}{list(value.shape)} {hashlib.sha256(raw_bytes(value)).hexdigest()}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{content(key)}: {content(part)}" for key, part in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(content, value)) + "]"
    if is_dataclass(value) and not isinstance(value, type):
        parts = (f"{part.name}={content(getattr(value, part.name))}" for part in fields(value))
        return f"{type(value).__name__}({', '.join(parts)})"
    if isinstance(value, _PLAIN):
        return repr(value)
    raise TypeError(f"the content of {type(value).__name__} is not known")
