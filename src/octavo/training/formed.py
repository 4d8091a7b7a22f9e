"""Training weights in the form in which they will be stored."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from octavo.errors import RequestError
from octavo.forms import Dense, Form, with_leaves
from octavo.sources.sites import Layout
from octavo.training.computed import refuse_shared


def formed(module: nn.Module, forms: Mapping[str, Form], layouts: Mapping[str, Layout] | None = None) -> None:
    """Compute parameters of ``module`` from forms, and train the dense leaves of the forms.

    Every :class:`octavo.forms.Dense` inside a form becomes a parameter; the rest, such as indices, is fixed. The module
    runs unchanged: when it reads its weight, it gets the form's matrix, with gradients.

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
    for name, form in forms.items():
        owner, parameter = _owner(module, name)
        weight, layout = getattr(owner, parameter), (layouts or {}).get(name, Layout())
        shape = tuple(weight.shape)
        if form.shape != layout.matrix_shape(shape):
            raise RequestError(
                f"{name!r}: its shape {shape} does not match a form of shape {form.shape}; give a form of that shape"
            )
        refuse_shared(module, name)
        parametrize.register_parametrization(owner, parameter, _Formed(form, layout, shape))


def forms_of(module: nn.Module) -> dict[str, Form]:
    """The forms of all parameters that :func:`formed` replaced, with the current values of their leaves."""
    found = {}
    for name, chain in _chains(module):
        leaves = [getattr(chain, f"original{k}").detach().clone() for k in range(len(chain[0].leaves))]
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
        self.form, self.layout, self.shape = form, layout, shape
        self.leaves: list[Tensor] = []
        with_leaves(form, self._collected)

    def right_inverse(self, weight: Tensor) -> Sequence[Tensor]:
        """The trained leaves; the weight's values are not used."""
        return [leaf.to(weight) for leaf in self.leaves]

    def forward(self, *leaves: Tensor) -> Tensor:
        return self.layout.from_matrix(self.rebuilt(leaves).dense(), self.shape)

    def rebuilt(self, leaves: Sequence[Tensor]) -> Form:
        """The form with other leaves, in the order of discovery."""
        coming = iter(leaves)
        return with_leaves(self.form, lambda leaf: Leaf(next(coming)) if isinstance(leaf, Dense) else leaf)

    def _collected(self, leaf: Form) -> Form:
        if isinstance(leaf, Dense):
            self.leaves.append(leaf.weight.detach().clone())
        return leaf


@dataclass(frozen=True)
class Leaf(Dense):
    """A dense leaf that keeps gradients and its training dtype."""

    def dense(self) -> Tensor:  # noqa: D102
        return self.weight
