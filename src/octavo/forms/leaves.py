"""The dense leaves of forms: floats that can be trained or compressed further, such as factors and kept values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from octavo.forms.base import Form, with_leaves
from octavo.forms.dense import Dense


def dense_leaves(form: Form) -> list[Tensor]:
    """The tensors of the dense leaves of a form, in the order in which :func:`with_leaves` finds them."""
    found: list[Tensor] = []

    def collected(leaf: Form) -> Form:
        if isinstance(leaf, Dense):
            found.append(leaf.weight)
        return leaf

    with_leaves(form, collected)
    return found


def with_dense_leaves(form: Form, leaves: Iterable[Tensor]) -> Form:
    """The form with other tensors in its dense leaves, in the order of :func:`dense_leaves`."""
    coming = iter(leaves)
    return with_leaves(form, lambda leaf: Dense(next(coming)) if isinstance(leaf, Dense) else leaf)


def on_device(form: Form, device: torch.device) -> Form:
    """A form with all its tensors on a device; those on the ``meta`` device have no values to move, and stay."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value if value.is_meta else value.to(device)
        if isinstance(value, Form):
            return on_device(value, device)
        return tuple(map(moved, value)) if isinstance(value, tuple) else value

    values = {field.name: getattr(form, field.name) for field in fields(form) if field.init}  # type: ignore[arg-type]
    return replace(form, **{name: moved(value) for name, value in values.items()})  # type: ignore[type-var]


def dense_form(tensor: Tensor) -> Form:
    """A matrix stored as it is."""
    return Dense(tensor)


def is_dense(form: Form) -> bool:
    """Whether a form is a matrix stored as it is."""
    return isinstance(form, Dense)
