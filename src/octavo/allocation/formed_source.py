"""Sources whose weights are forms: the dense leaves of the forms are tensors, and so sites, of their own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from octavo.allocation.composed import Composed
from octavo.artifact import Entry, Kept, Packed, pack
from octavo.errors import RequestError
from octavo.forms import Form
from octavo.forms.leaves import dense_form, dense_leaves, is_dense, with_dense_leaves
from octavo.sources.modules import own_tensors
from octavo.sources.narrowing import FLOATS
from octavo.sources.sites import Layout, Site
from octavo.sources.source import Source


@dataclass
class FormedSource(Source):
    """A source some of whose weights are forms.

    Tensors and sites are the leaves of the forms, and all other tensors. Sizes are those of the model that they are
    computed for: a ratio compares with its dense weights.

    Parameters
    ----------
    whole
        The source with dense weights.
    composed
        The weights that are forms.
    """

    whole: Source = field(kw_only=True)
    composed: tuple[Composed, ...] = field(kw_only=True)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense weights."""
        return self.whole.dense_bytes

    @property
    def weights(self) -> int:
        """Number of elements of the dense weights."""
        return self.whole.weights

    def every_shape(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the dense weights."""
        return self.whole.every_shape()

    def fingerprint(self) -> str:
        """That of the tensors, and of all that the forms hold beside them."""
        digest = hashlib.sha256(super().fingerprint().encode())
        for weight in self.composed:
            rest = weight.packed(dict.fromkeys(weight.leaves, Packed(b"", {}, {}, {})))
            digest.update(json.dumps([weight.name, weight.shape, vars(weight.layout), rest.meta]).encode() + rest.blob)
        return digest.hexdigest()

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The leaves of all forms by name."""
        return {name: leaf for weight in self.composed for name, leaf in weight.leaves.items()}

    @property
    def direct(self) -> dict[str, str]:
        """Maps tensors to the module's; weights that are forms are computed."""
        made = {weight.name for weight in self.composed}
        return {name: own for name, own in self.parameters.items() if self.aliases.get(name, name) not in made}

    def placed(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The module's tensors that change if leaves, or whole weights, are replaced."""
        whole = {weight.target: weights[weight.name] for weight in self.composed if weight.name in weights}
        return {**super().placed(weights), **whole}

    def sites(self) -> tuple[list[Site], dict[str, str]]:
        """All sites; a leaf is a matrix as it stands."""
        leaves = self.leaves
        sites, reasons = super().sites()
        for site in sites:
            if site.name in leaves and site.layout.exponent:
                reasons[site.name] = "too large or too small for a part of a form"

        def as_it_stands(site: Site) -> Site:
            return Site(site.name, "linear" if site.shape[0] > 1 else "vector", site.shape, site.dtype)

        found = (as_it_stands(site) if site.name in leaves else site for site in sites)
        return [site for site in found if site.name not in reasons], reasons

    def gathered(
        self, entries: Mapping[str, Entry], kept: Mapping[str, Kept]
    ) -> tuple[dict[str, Entry], dict[str, Kept]]:
        """Entries and kept tensors of an artifact, with the leaves inside their forms."""
        leaves = self.leaves
        inside = {
            name: entries[name].packed if name in entries else pack(dense_form(kept[name].tensor())) for name in leaves
        }
        alone = {name: entry for name, entry in entries.items() if name not in leaves}
        found = {weight.name: weight.entry(inside) for weight in self.composed}
        return {**alone, **found}, {name: item for name, item in kept.items() if name not in leaves}


def with_forms(
    source: Source,
    forms: Mapping[str, Form],
    layouts: Mapping[str, Layout] | None = None,
    dtype: torch.dtype | None = None,
) -> Source:
    """A source in which forms stand in place of weights; its module, if there is one, gets their values.

    Parameters
    ----------
    forms
        By the name of the parameter.
    layouts
        Layouts of weights that are read otherwise than usual.
    dtype
        What all floating tensors are rounded to.

    Raises
    ------
    RequestError
        If a name is not known, a form has another shape, or a weight is not a floating tensor.
    """
    names = {own: name for name, own in reversed(source.parameters.items())}
    composed, values = dict[str, Composed](), dict[str, Tensor]()
    for given, form in forms.items():
        name = names.get(given, given)
        name = source.aliases.get(name, name)
        layout = _checked(source, given, name, form, (layouts or {}).get(given))
        if name in composed or name in values:
            raise RequestError(
                f"{source.title}: {given!r} is one tensor with another that has a form; give one of them"
            )
        # Leaves are told apart by their tensors, so each gets its own.
        form = with_dense_leaves(form, map(_alone, dense_leaves(form)))
        target, shape, kind = source.parameters.get(name, name), source.shapes[name], source.dtypes[name]
        weight = Composed(name, target, form, layout, shape, kind)
        value = weight.weight(weight.leaves.values())
        if not bool(torch.isfinite(value).all()):
            raise RequestError(f"{source.title}: the form of {given!r} holds NaN or Inf; repair or train it again")
        if source.module is not None:
            with torch.no_grad():
                own_tensors(source.module)[target].copy_(value)
        if is_dense(form):
            values[name] = value.to(kind)
        else:
            composed[name] = weight
    return _formed(source, composed, values, dtype)


def _formed(
    source: Source, composed: Mapping[str, Composed], values: Mapping[str, Tensor], dtype: torch.dtype | None
) -> FormedSource:
    """The source with these weights in place of its own."""
    leaves = {name: leaf for weight in composed.values() for name, leaf in weight.leaves.items()}
    new = {**leaves, **values}

    def read(name: str) -> Tensor:
        tensor = new[name] if name in new else source.read(name)
        return tensor.to(dtype).to(tensor.dtype) if dtype is not None and tensor.dtype in FLOATS else tensor

    rest = [name for name in source.shapes if name not in composed]
    held = {item.name: getattr(source, item.name) for item in fields(Source) if item.init}
    held |= {
        "shapes": {name: source.shapes[name] for name in rest} | {n: tuple(leaf.shape) for n, leaf in leaves.items()},
        "dtypes": {name: source.dtypes[name] for name in rest} | {name: leaf.dtype for name, leaf in leaves.items()},
        "read": read,
        "digests": {},
        "exponents": {},
        "conversions": [*source.conversions, *(weight.conversion for weight in composed.values())],
    }
    return FormedSource(**held, whole=source, composed=tuple(composed.values()))


def _checked(source: Source, given: str, name: str, form: Form, layout: Layout | None) -> Layout:
    """The layout of a weight that becomes a form."""
    if name not in source.shapes:
        known = ", ".join(list(source.shapes)[:5])
        raise RequestError(f"{source.title}: has no parameter {given!r}; choose from {known} ...")
    if source.dtypes[name] not in FLOATS:
        raise RequestError(f"{source.title}: {given!r} holds {source.dtypes[name]}, not floats; give no form of it")
    layout = layout or source.layout_of(name)
    if form.shape != layout.matrix_shape(source.shapes[name]):
        raise RequestError(
            f"{source.title}: {given!r} of shape {source.shapes[name]} is a matrix of shape "
            f"{layout.matrix_shape(source.shapes[name])}, but its form has shape {form.shape}; give a form of that "
            "shape, or say with layouts= how the weight is read"
        )
    return layout


def _alone(leaf: Tensor) -> Tensor:
    """A leaf's tensor of its own; forms compute in float32."""
    tensor = leaf.detach()
    return tensor.float() if tensor.dtype == torch.float64 else tensor
