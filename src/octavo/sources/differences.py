"""The difference of a tuned model to its base as a source: what changed, and what is new."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from octavo.errors import RequestError
from octavo.sources.bases import Base, base_for
from octavo.sources.narrowing import FLOATS
from octavo.sources.source import Source, examine
from octavo.system.raw import narrowed

#: Bytes of an element of the difference that sizes are compared with.
_HALF = 2


def added(base: Tensor, difference: Tensor, dtype: torch.dtype) -> Tensor:
    """The tuned tensor: a difference added to the base's tensor, rounded to ``dtype``."""
    wide = wide_dtype(base, difference)
    return narrowed(base.to(difference.device, wide) + difference.to(wide), dtype)


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that differences are taken in: float32, or float64 if one of the tensors has it."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


@dataclass
class Difference(Source):
    """A tuned model of which only what differs from its base is stored.

    Tensors are the differences, in float32, of floating tensors that changed. Tensors that the base lacks, or has in
    another shape, are whole. Those that did not change are not among them. Original bytes are those of all these
    tensors at 16 bits.

    Parameters
    ----------
    tuned
        The tuned model.
    base
        Its base.
    same
        Tensors that did not change.
    whole
        Tensors that are stored whole.
    dtype
        The dtype of the tuned tensors whose differences are stored.
    """

    tuned: Source = field(kw_only=True)
    base: Base = field(kw_only=True)
    same: tuple[str, ...] = field(kw_only=True)
    whole: tuple[str, ...] = field(kw_only=True)
    dtype: torch.dtype = field(kw_only=True)

    @property
    def original_bytes(self) -> int:
        """Bytes of what changed and of what is new, with 16 bits for every float that has more."""
        size = {name: dtype.itemsize for name, dtype in self.dtypes.items()}
        size |= {name: min(size[name], _HALF) for name, dtype in self.dtypes.items() if dtype in FLOATS}
        return sum(math.prod(shape) * size[name] for name, shape in self.shapes.items())

    @property
    def weights(self) -> int:
        """Number of weights of the tuned model."""
        return self.tuned.weights

    def every_shape(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors of the tuned model, aliases included."""
        return self.tuned.every_shape()

    def fingerprint(self) -> str:
        """SHA-256 over the differences and the content of the base."""
        digest = hashlib.sha256(super().fingerprint().encode())
        digest.update(self.base_fingerprint().encode())
        return digest.hexdigest()

    def base_fingerprint(self) -> str:
        """SHA-256 over the tensors of the base that the tuned model rests on."""
        return self.base.fingerprint([*self.same, *(name for name in self.shapes if name not in self.whole)])

    def value(self, name: str, stored: Tensor | None = None) -> Tensor:
        """A tensor of the tuned model, or what it is if ``stored`` takes the place of what is stored of it."""
        if stored is None:
            return self.tuned.read(name)
        if name in self.whole or name in self.same:
            return stored
        return added(self.base.read(name), stored, torch.float64 if stored.dtype == torch.float64 else torch.float32)


def difference(tuned: Source, given: Any) -> Difference:
    """The difference of an opened model to its base.

    Parameters
    ----------
    given
        The base, as :func:`octavo.sources.bases.open_base` takes it.

    Raises
    ------
    RequestError
        If the base cannot be opened or has other tensors, or nothing differs.
    """
    if type(tuned) is not Source:
        raise RequestError(f"{tuned.title}: weights that are forms have no base; leave base out")
    examine(tuned)
    base = base_for(tuned, given)
    where = tuned.path or tuned.title
    kinds = [dtype for name, dtype in tuned.dtypes.items() if dtype in FLOATS and len(tuned.shapes[name]) > 1]
    dtype = max(kinds, key=kinds.count, default=torch.float32)
    same = [name for name in tuned.shapes if _same(tuned, base, name)]
    changed = [name for name in tuned.shapes if name not in same]
    whole = [name for name in changed if not _differs(tuned, base, name, dtype)]
    if not changed:
        raise RequestError(f"{where}: equals its base, so there is nothing to store; give the tuned model")
    if len(whole) == len(changed):
        raise RequestError(
            f"{where}: no tensor of it is a changed tensor of {base.source.path or base.source.title}; give the model "
            "that it was tuned from as base, or leave base out"
        )
    rest = set(changed) - set(whole)

    def read(name: str) -> Tensor:
        tensor = tuned.read(name).detach()
        if name not in rest:
            return tensor
        other = base.read(name)
        wide = wide_dtype(tensor, other)
        return tensor.to(wide) - other.to(tensor.device, wide)

    held = {item.name: getattr(tuned, item.name) for item in fields(Source) if item.init}
    held |= {
        "shapes": {name: tuned.shapes[name] for name in changed},
        "dtypes": {name: _wide(tuned, base, name) if name in rest else tuned.dtypes[name] for name in changed},
        "read": read,
        "digests": {name: tuned.digests[name] for name in whole},
        "exponents": {},
        "notes": list(tuned.notes),
    }
    made = Difference(**held, tuned=tuned, base=base, same=tuple(same), whole=tuple(whole), dtype=dtype)
    made.notes.append(
        f"only the difference to {base.source.title} is stored: {len(rest)} tensors changed, {len(same)} did not and "
        f"cost only their names, {len(whole)} are stored whole; sizes are compared with {made.original_bytes:,} bytes, "
        "those of what changed or is new in 16 bits"
    )
    return made


def _same(tuned: Source, base: Base, name: str) -> bool:
    """Whether a tensor is the base's, bit for bit."""
    own = base.stored(name)
    alike = own is not None and base.shape(name) == tuned.shapes[name] and base.source.dtypes[own] == tuned.dtypes[name]
    return alike and base.digest(name) == tuned.digests[name]


def _differs(tuned: Source, base: Base, name: str, dtype: torch.dtype) -> bool:
    """Whether a changed tensor is stored as a difference: floats of the usual dtype and of the base's shape."""
    own = base.stored(name)
    if own is None or base.shape(name) != tuned.shapes[name] or name in tuned.fixed:
        return False
    return tuned.dtypes[name] == dtype and base.source.dtypes[own] in FLOATS


def _wide(tuned: Source, base: Base, name: str) -> torch.dtype:
    own = base.stored(name)
    assert own is not None
    both = (tuned.dtypes[name], base.source.dtypes[own])
    return torch.float64 if torch.float64 in both else torch.float32
