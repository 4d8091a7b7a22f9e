"""What flows: names, shapes and dtypes of tensors, on which a sender and a receiver agree once."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from octavo.artifact import dtype_name
from octavo.errors import RequestError

#: Floating dtypes by the name that plans hold.
_DTYPES = {dtype_name(dtype): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)}
#: More elements than memory addresses are no shape of anything.
_MOST = 1 << 40


@dataclass(frozen=True)
class Schema:
    """Floating tensors by name, in their order.

    Parameters
    ----------
    names, dtypes, shapes
        One of each for every tensor.
    """

    names: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Schema:
        """That of some tensors.

        Raises
        ------
        RequestError
            If there are none, or one is not floating.
        """
        if not tensors:
            raise RequestError("a flow carries tensors: there are none; give at least one by its name")
        for name, tensor in tensors.items():
            if tensor.dtype not in _DTYPES.values():
                raise RequestError(
                    f"{name!r} has dtype {tensor.dtype}; a flow carries {', '.join(_DTYPES)}, so leave it out, or send "
                    "it by other means"
                )
        return cls(
            tuple(tensors), tuple(t.dtype for t in tensors.values()), tuple(tuple(t.shape) for t in tensors.values())
        )

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Elements of every tensor."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def elements(self) -> int:
        """Elements of all tensors."""
        return sum(self.sizes)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are."""
        return sum(size * dtype.itemsize for size, dtype in zip(self.sizes, self.dtypes, strict=True))

    @cached_property
    def digest(self) -> bytes:
        """Eight bytes that tell this schema from others."""
        return hashlib.sha256(json.dumps(self.plain()).encode()).digest()[:8]

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise :class:`RequestError` unless the tensors are those that were agreed on, and finite."""
        if extra := sorted(tensors.keys() - set(self.names)):
            raise RequestError(f"{extra[0]!r} is not in the plan; fit a new plan, and send it to the receiver")
        for name, dtype, shape in zip(self.names, self.dtypes, self.shapes, strict=True):
            if name not in tensors:
                raise RequestError(f"{name!r} is in the plan and was not given; send zeros where nothing changed")
            tensor = tensors[name]
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise RequestError(
                    f"{name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}, the plan says {dtype} of {shape}; "
                    "fit a new plan, and send it to the receiver"
                )
            if not all_finite(tensor):
                raise RequestError(f"{name!r} has values that are not finite; nothing was sent")

    def flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """All elements in a row, float32, on the CPU, in memory of their own."""
        return torch.cat([tensors[name].detach().cpu().float().flatten() for name in self.names])

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """The inverse of :meth:`flat`, in each tensor's own dtype; what that dtype cannot hold is clamped."""
        parts = zip(self.names, self.dtypes, self.shapes, flat.split(self.sizes), strict=True)
        return {name: _clamped(part, dtype).to(dtype).view(shape) for name, dtype, shape, part in parts}

    def held_(self, flat: Tensor) -> Tensor:
        """All elements as :meth:`split` gives them, changed in place."""
        for dtype, part in zip(self.dtypes, flat.split(self.sizes), strict=True):
            _clamped(part, dtype, out=part)
            if dtype is not torch.float32:
                part.copy_(part.to(dtype))
        return flat

    def plain(self) -> list[list[Any]]:
        """As JSON holds it: name, dtype and shape of every tensor."""
        rows = zip(self.names, self.dtypes, self.shapes, strict=True)
        return [[name, dtype_name(dtype), list(shape)] for name, dtype, shape in rows]

    @classmethod
    def from_plain(cls, rows: Any) -> Schema:
        """The inverse of :meth:`plain`; raises :class:`ValueError` where it is none."""
        names, dtypes, shapes = list[str](), list[torch.dtype](), list[tuple[int, ...]]()
        for name, dtype, shape in rows:
            if not isinstance(name, str) or dtype not in _DTYPES or not isinstance(shape, list):
                raise ValueError(f"{name!r}: not a name, a floating dtype and a shape")
            if not all(type(size) is int and size >= 0 for size in shape) or math.prod(shape) > _MOST:
                raise ValueError(f"{name!r}: {shape} is no shape")
            names.append(name)
            dtypes.append(_DTYPES[dtype])
            shapes.append(tuple(shape))
        if not names or len(set(names)) < len(names):
            raise ValueError("names are missing or not unique")
        return cls(tuple(names), tuple(dtypes), tuple(shapes))


def _clamped(part: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """What a dtype can hold of each value, in float32."""
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return torch.clamp(part, -largest, largest, out=out)


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite: both extremes are NaN if one is, and nothing is copied to find them."""
    return not tensor.numel() or all(math.isfinite(end) for end in tensor.detach().aminmax())
