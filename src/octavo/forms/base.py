"""The base class of forms: how the content of a site is stored, restored and run."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from octavo.coding import Allowance, ParityContext
from octavo.errors import ArtifactError
from octavo.system.registry import Registry

#: The key of the manifest entry under which :func:`restore` passes the nesting depth to :func:`child`.
_WITHIN = "_within"

#: Forms nest (``Sum(Grid, LowRank(Grid, Grid))``); an untrusted manifest may not nest deeper than this.
MAX_DEPTH = 6
#: Bytes of memory that a form may take per weight: 48 times those of a float32.
_MOST = 192
#: Bytes that a form may take regardless of its size: 4 MB.
_LEAST = 4 << 20
#: Weights that are decoded at once while running: 4 MB of them.
_AT_ONCE = 1 << 20


class Form(ABC):
    """A matrix of ``rows`` x ``columns`` in some compressed representation.

    A form never sees a module: sites turn their weights into a matrix (see :class:`octavo.sources.sites.Layout`),
    methods find forms for it. Integer tensors in :meth:`tensors` are coded by :mod:`octavo.coding`, whichever
    codec is smallest; floating tensors are stored as they are.
    """

    name: ClassVar[str]
    #: Whether it is made of factors that can be applied one after another.
    factored: ClassVar[bool] = False

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The tensors to store, by part name. Parts of a nested form have the prefix ``child/``."""

    @abstractmethod
    def meta(self) -> dict[str, Any]:
        """Plain JSON stored in the manifest; ``form`` names the class."""

    @classmethod
    @abstractmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> Form:
        """Exact inverse of :meth:`tensors` and :meth:`meta`; everything is checked against ``shape``."""

    @classmethod
    @abstractmethod
    def work(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> int:
        """Largest memory of :meth:`restore` and :meth:`dense` in bytes, with intermediates and the result.

        Stored parts and nested forms are counted separately. This is called before anything is restored, so ``meta`` is
        not checked yet. A form that needs too much is refused (:func:`allowance_for`).
        """

    @abstractmethod
    def dense(self) -> Tensor:
        """The float32 matrix that the form represents."""

    def lookup(self, index: Tensor) -> Tensor:
        """``dense()[index]`` for ``index`` (n,), without the rest of the matrix where that can be avoided."""
        return self.dense()[index]

    def apply(self, x: Tensor) -> Tensor:
        """``x @ dense().T`` for ``x`` of shape (..., columns), without the dense matrix where that is cheaper."""
        return x @ self.dense().to(x.dtype).t()

    def grown(self, share: float, stored: Callable[[Form], int]) -> int:
        """Bytes that it would take with so many times the rows.

        Parameters
        ----------
        share
            Rows then for each row now.
        stored
            Bytes that a form takes as it is.
        """
        return round(stored(self) * share)

    def contexts(self) -> list[tuple[Tensor, ParityContext]]:
        """Tensors among :meth:`tensors` that code better knowing bits which their own rows above determine."""
        return [found for part in _parts(self) if isinstance(part, Form) for found in part.contexts()]

    def held(self) -> list[Tensor]:
        """The tensors that the form holds in memory; the stored ones may differ."""
        parts: list[Tensor] = []
        for part in _parts(self):
            if isinstance(part, Tensor):
                parts.append(part)
            elif isinstance(part, Form):
                parts += part.held()
        return parts


def _parts(form: Form) -> Iterator[Any]:
    """The values of a form's fields, those of tuples one by one."""
    for field in fields(form):  # type: ignore[arg-type]
        value = getattr(form, field.name)
        yield from value if isinstance(value, tuple) else (value,)


def apply_by_rows(form: Form, x: Tensor) -> Tensor:
    """``x @ dense().T`` with only a few rows of the matrix in memory at a time."""
    rows, columns = form.shape
    step = max(1, _AT_ONCE // max(columns, 1))
    parts = (form.lookup(torch.arange(start, min(start + step, rows))) for start in range(0, rows, step))
    return torch.cat([x @ part.to(x.dtype).t() for part in parts], -1)


#: A name in a manifest never decides what is imported: files of this folder and installed packages alone are.
FORMS = Registry[type[Form]]("form", "octavo.forms")


def form(name: str) -> Callable[[type[Form]], type[Form]]:
    """Register a form class under the name used in manifests."""

    def register(cls: type[Form]) -> type[Form]:
        FORMS.add(name, cls)
        cls.name = name
        return cls

    return register


def form_names() -> list[str]:
    """Names of all registered forms."""
    return FORMS.names()


def form_class(name: object) -> type[Form] | None:
    """The class of a form by its name; None if there is none."""
    return FORMS.get(name) if isinstance(name, str) and name in FORMS else None


def allowance_for(shape: tuple[int, int]) -> Allowance:
    """The memory that any form of a matrix of this shape may take while being restored and made dense."""
    return Allowance(_MOST * elements(shape) + _LEAST)


@dataclass(frozen=True)
class _Within:
    """The depth at which a form is nested, and the memory left for it."""

    depth: int
    allowance: Allowance


def restore(
    tensors: Mapping[str, Tensor],
    meta: Any,
    shape: tuple[int, int],
    *,
    depth: int = 0,
    allowance: Allowance | None = None,
) -> Form:
    """Rebuild a form of ``shape`` from stored parts; anything inconsistent raises :class:`ArtifactError`.

    Parameters
    ----------
    allowance
        Memory that the form may take, including making it dense; :func:`allowance_for` by default.
    """
    allowance = allowance or allowance_for(shape)
    if depth > MAX_DEPTH:
        raise ArtifactError(f"forms nest deeper than {MAX_DEPTH}; this manifest was not written by Octavo")
    kind = meta.get("form") if isinstance(meta, Mapping) else None
    cls = form_class(kind)
    if cls is None:
        raise ArtifactError(f"unknown form {kind!r}; this version knows {', '.join(form_names())}")
    try:
        allowance.take(cls.work(tensors, meta, shape), f"a {kind} form of shape {shape}")
        made = cls.restore(tensors, {**meta, _WITHIN: _Within(depth, allowance)}, shape)
        own = made.meta()
    except ArtifactError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, OverflowError) as error:
        if "can't allocate memory" in str(error) or "out of memory" in str(error):
            raise ArtifactError(
                f"a {kind} form of shape {shape} needs more memory than is available: {error}"
            ) from error
        raise ArtifactError(f"the parts of a {kind} form of shape {shape} do not fit together: {error}") from error
    # Octavo did not write a value that the form did not read or read differently ("24" as two modes, 4.7 groups as 4).
    odd = sorted(str(key) for key in {*meta, *own} if key not in meta or key not in own or meta[key] != own[key])
    expect(not odd, f"a {kind} form of shape {shape} has entries that Octavo does not write ({', '.join(odd)[:200]})")
    return made


def child(tensors: Mapping[str, Tensor], meta: Mapping[str, Any], name: str, shape: tuple[int, int]) -> Form:
    """Restore the nested form ``name`` of a form that is being restored."""
    prefix = f"{name}/"
    parts = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
    within: _Within = meta[_WITHIN]
    return restore(parts, meta[name], shape, depth=within.depth + 1, allowance=within.allowance)


def nest(**children: Form) -> dict[str, Tensor]:
    """Part names of nested forms: ``child/part``."""
    return {f"{name}/{part}": tensor for name, inner in children.items() for part, tensor in inner.tensors().items()}


def with_leaves(form: Form, change: Callable[[Form], Form]) -> Form:
    """A copy of nested forms in which ``change`` replaced every form that holds no other form.

    With it, factors are quantized after they were found, or trained in the form in which they will be stored.
    """
    changes: dict[str, Any] = {}
    for field in fields(form):  # type: ignore[arg-type]
        value = getattr(form, field.name)
        if isinstance(value, Form):
            changes[field.name] = with_leaves(value, change)
        elif isinstance(value, tuple) and value and all(isinstance(inner, Form) for inner in value):
            changes[field.name] = tuple(with_leaves(inner, change) for inner in value)
    return replace(form, **changes) if changes else change(form)  # type: ignore[type-var]


def expect(condition: bool, message: str) -> None:
    """Raise :class:`ArtifactError` unless ``condition`` is true; every value read from a file is checked with this."""
    if not condition:
        raise ArtifactError(message)


def expect_integers(tensor: Tensor, shape: tuple[int, ...], part: str) -> Tensor:
    """Check dtype and shape of an integer part."""
    expect(not tensor.dtype.is_floating_point, f"part {part!r} has dtype {tensor.dtype}, expected integers")
    expect(tuple(tensor.shape) == shape, f"part {part!r} has shape {tuple(tensor.shape)}, expected {shape}")
    return tensor


def expect_floats(tensor: Tensor, part: str, *, elements: int | None = None) -> Tensor:
    """Check that a floating part is floating, finite and, if given, has ``elements`` elements."""
    expect(tensor.dtype.is_floating_point, f"part {part!r} has dtype {tensor.dtype}, expected floats")
    expect(
        elements is None or tensor.numel() == elements,
        f"part {part!r} has {tensor.numel()} elements, expected {elements}",
    )
    expect(bool(torch.isfinite(tensor).all()), f"part {part!r} holds NaN or Inf")
    return tensor


def elements(shape: tuple[int, ...]) -> int:
    """Number of elements of a shape."""
    return math.prod(shape)
