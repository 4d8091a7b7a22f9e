"""Training weights in the form in which they will be stored."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from octavo.errors import RequestError
from octavo.forms import BlockScaled, Dense, Form, Grid, with_leaves
from octavo.forms.leaves import on_device
from octavo.sources.sites import Layout
from octavo.training.computed import refuse_shared


def formed(module: nn.Module, forms: Mapping[str, Form], layouts: Mapping[str, Layout] | None = None) -> None:
    """Compute parameters of ``module`` from forms, and train the dense leaves of the forms.

    Every :class:`octavo.forms.Dense` inside a form becomes a parameter; the rest, such as indices, is fixed. The module
    runs unchanged: when it reads its weight, it gets the form's matrix, with gradients. The padding row of an embedding
    stays zero if it is zero.

    Parameters
    ----------
    forms
        Maps parameter names, such as ``encoder.0.weight``, to forms of their matrices.
    layouts
        Layouts of weights whose matrix is not (outputs, everything else).

    Raises
    ------
    RequestError
        If the parameter does not exist or is shared with another module, or the form has another shape.
    """
    layouts = {name: (layouts or {}).get(name, Layout()) for name in forms}
    for name, form in forms.items():
        shape = tuple(getattr(*_owner(module, name)).shape)
        if form.shape != layouts[name].matrix_shape(shape):
            raise RequestError(
                f"{name!r}: its shape {shape} does not match a form of shape {form.shape}; give a form of that shape"
            )
    refuse_shared(module, forms)
    for name, form in forms.items():
        (owner, parameter), layout = _owner(module, name), layouts[name]
        shape = tuple(getattr(owner, parameter).shape)
        row = zero_row_of(owner) if parameter == "weight" and layout == Layout() else None
        form = form if row is None else with_zero_row(form, row)
        parametrize.register_parametrization(owner, parameter, _Formed(form, layout, shape))


def forms_of(module: nn.Module) -> dict[str, Form]:
    """The forms of all parameters that :func:`formed` replaced, with the current values of their leaves."""
    found = {}
    for name, chain in _chains(module):
        leaves = [getattr(chain, f"original{k}").detach().clone() for k in range(chain[0].count)]
        found[name] = chain[0].rebuilt(leaves)
    return found


def layouts_of(module: nn.Module) -> dict[str, Layout]:
    """How the parameters that :func:`formed` replaced are read as matrices."""
    return {name: chain[0].layout for name, chain in _chains(module)}


def plain_copy(module: nn.Module, names: Iterable[str]) -> nn.Module:
    """A copy of a module in which some parameters are tensors, whatever they were computed from.

    Raises
    ------
    RequestError
        If one of the parameters does not exist.
    """
    copied = copy.deepcopy(module)
    for name in names:
        owner, parameter = _owner(copied, name)
        if parametrize.is_parametrized(owner, parameter):
            unparametrized(owner, parameter)
    return copied


def settle(module: nn.Module) -> dict[str, Form]:
    """Replace every form from :func:`formed` by its current dense matrix; returns the forms."""
    found = forms_of(module)
    for name in found:
        unparametrized(*_owner(module, name))
    return found


def without_leaves(form: Form) -> Form:
    """A form whose dense leaves have shapes but no values, for code that trains them elsewhere."""
    return with_leaves(form, lambda leaf: Dense(leaf.weight.to("meta")) if isinstance(leaf, Dense) else leaf)


def zero_row_of(module: nn.Module) -> int | None:
    """The padding row of an embedding, if it is zero; None for other modules."""
    row = module.padding_idx if isinstance(module, nn.Embedding) else None
    return None if row is None or bool(module.get_parameter("weight")[row].any()) else row


def with_zero_row(form: Form, row: int) -> Form:
    """A form with zeros in one row, whatever is learned: the rest of the form may be shared by all rows."""
    codes = torch.ones(form.shape[0], 1, dtype=torch.int8)
    codes[row] = 0
    return BlockScaled(form, Grid(codes, torch.ones(1, 1, dtype=torch.float16)))


def unparametrized(owner: nn.Module, parameter: str) -> None:
    """Replace a computed parameter by its current value; copies of the module still compute theirs."""
    # Copies share the class that PyTorch made for the module, from which it removes the parameter.
    kind = type(owner)
    owner.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
    parametrize.remove_parametrizations(owner, parameter)


def _chains(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The parametrizations from :func:`formed`, by the name of their parameter."""
    for prefix, owner in module.named_modules():
        for parameter, chain in getattr(owner, "parametrizations", {}).items():
            if isinstance(chain[0], _Formed):
                yield f"{prefix}.{parameter}".lstrip("."), chain


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    prefix, _, parameter = name.rpartition(".")
    try:
        owner = module.get_submodule(prefix)
        if isinstance(getattr(owner, parameter), Tensor):
            return owner, parameter
    except AttributeError:
        pass
    known = ", ".join(list(dict(module.named_parameters()))[:5])
    raise RequestError(f"{type(module).__name__}: has no parameter {name!r}; choose from {known} ...")


class _Formed(nn.Module):
    """The parametrization: the leaves are its originals, and it returns the weight."""

    def __init__(self, form: Form, layout: Layout, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.form, self.layout, self.shape = without_leaves(form), layout, shape
        self.device: torch.device | None = None
        #: Where leaves start, until they are parameters.
        self.start: list[Tensor] = []
        with_leaves(form, self._collected)
        self.count = len(self.start)

    def right_inverse(self, weight: Tensor) -> Sequence[Tensor]:
        """The leaves, once; the weight's values are not used."""
        if len(self.start) < self.count:
            raise RequestError(
                f"weight of shape {self.shape}: is computed from a {self.form.name} form, so it cannot be set; call "
                "octavo.training.settle first"
            )
        leaves, self.start = [leaf.to(weight) for leaf in self.start], []
        return leaves

    def forward(self, *leaves: Tensor) -> Tensor:
        return self.layout.from_matrix(self.rebuilt(leaves).dense(), self.shape)

    def rebuilt(self, leaves: Sequence[Tensor]) -> Form:
        """The form with other leaves, in the order of discovery."""
        coming = iter(leaves)
        # The module may have been moved since the last time.
        if leaves and leaves[0].device != self.device:
            self.form, self.device = on_device(self.form, leaves[0].device), leaves[0].device
        return with_leaves(self.form, lambda leaf: Leaf(next(coming)) if isinstance(leaf, Dense) else leaf)

    def _collected(self, leaf: Form) -> Form:
        if isinstance(leaf, Dense):
            self.start.append(leaf.weight.detach().clone())
        return leaf


@dataclass(frozen=True)
class Leaf(Dense):
    """A dense leaf that keeps gradients and its training dtype."""

    def dense(self) -> Tensor:  # noqa: D102
        return self.weight
