"""A model without some of its units: copies whose tensors are smaller, or forms that leave out what went."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from octavo.cuts.base import Units, check_kept, left
from octavo.cuts.layers import drop_layers, dropped
from octavo.forms import Dense, Form, Trimmed
from octavo.sources.resizing import resize


def without(model: nn.Module, units: Sequence[Units], kept: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model whose tensors have lost all slices of the units that are not kept.

    Raises
    ------
    RequestError
        If ``kept`` does not fit the units, or a tensor the layer that it belongs to.

    Examples
    --------
    >>> import torch
    >>> from octavo.cuts import Slice
    >>> net, places = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.arange(4)[:, None]
    >>> slices = tuple(Slice(name, dim, places) for name, dim in (("0.weight", 0), ("0.bias", 0), ("2.weight", 1)))
    >>> hidden = Units("0", "neuron", 4, slices)
    >>> without(net, [hidden], {"0": torch.tensor([True, False, True, False])})
    Sequential(
      (0): Linear(in_features=3, out_features=2, bias=True)
      (1): ReLU()
      (2): Linear(in_features=2, out_features=2, bias=True)
    )
    """
    check_kept(units, kept)
    thinner, whole, own = copy.deepcopy(model), dropped(units, kept), model.state_dict(keep_vars=True)
    smaller = {}
    for name, masks in left(model, units, kept).items():
        if name in whole:
            continue
        tensor = own[name].detach()
        for dim, mask in enumerate(masks):
            tensor = tensor.index_select(dim, mask.nonzero()[:, 0].to(tensor.device))
        smaller[name] = tensor
    resize(thinner, smaller)
    drop_layers(thinner, units, kept)
    return thinner


def trimmed(model: nn.Module, units: Sequence[Units], kept: Mapping[str, Tensor]) -> dict[str, Form]:
    """Forms of all matrices that lose slices, which store what is left of them and run as zeros elsewhere.

    Raises
    ------
    RequestError
        If ``kept`` does not fit the units.

    Examples
    --------
    >>> import torch
    >>> from octavo.cuts import Slice
    >>> net, places = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.arange(4)[:, None]
    >>> hidden = Units("0", "neuron", 4, (Slice("0.weight", 0, places), Slice("2.weight", 1, places)))
    >>> forms = trimmed(net, [hidden], {"0": torch.tensor([True, False, True, False])})
    >>> {name: tuple(form.inner.weight.shape) for name, form in forms.items()}
    {'0.weight': (2, 3), '2.weight': (2, 2)}
    """
    check_kept(units, kept)
    own, forms = model.state_dict(), dict[str, Form]()
    for name, masks in left(model, units, kept).items():
        if len(masks) == 2:
            rows, columns = masks
            forms[name] = Trimmed(Dense(own[name][rows][:, columns].clone()), rows, columns)
    return forms


def skeleton(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """A copy of a model whose tensors have other shapes; their content is yet to be loaded.

    ``octavo.load(path, into=skeleton(model, octavo.Artifact(path).loadable_shapes()))`` gives back a model that was cut
    before it was compressed.
    """
    made, own = copy.deepcopy(model), model.state_dict(keep_vars=True)
    resize(made, {n: own[n].new_zeros(s) for n, s in shapes.items() if n in own and tuple(own[n].shape) != tuple(s)})
    return made
