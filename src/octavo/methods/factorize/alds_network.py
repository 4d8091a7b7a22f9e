"""ALDS of a whole network: groups and ranks of all layers at once, and the forms to train and store."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from octavo.errors import RequestError
from octavo.forms import Form
from octavo.methods.factorize.alds import ALDS, decomposed
from octavo.methods.factorize.minimax import Allocation, RankChoice, RankedLayer, allocate_ranks
from octavo.sources.sites import Layout, Site
from octavo.sources.source import from_module


@dataclass(frozen=True)
class NetworkForms:
    """The layers of a network as low-rank products.

    Parameters
    ----------
    forms
        :class:`octavo.forms.GroupedLowRank` by the name of the parameter, for :func:`octavo.training.formed` and
        :func:`octavo.save`. Layers that stay dense are left out.
    layouts
        How these parameters are read as matrices.
    allocation
        Groups and rank of every layer, the largest relative error, and the number of coefficients.
    """

    forms: dict[str, Form]
    layouts: dict[str, Layout]
    allocation: Allocation


def ranked_layers(model: nn.Module, *, bound: bool = False) -> dict[str, RankedLayer]:
    """All layers that ALDS decomposes: linear layers and convolutions, but not depthwise ones, by parameter name.

    Parameters
    ----------
    bound
        Whether errors include the factor ``sqrt(k)`` (:class:`octavo.methods.factorize.minimax.RankedLayer`).
    """
    source = from_module(model)
    return {
        site.name: RankedLayer(
            site.layout.to_matrix(source.read(site.name)), site.columns // math.prod(site.shape[2:]), bound=bound
        )
        for site in _sites(model)
    }


def alds_forms(
    model: nn.Module, share: float, *, groups: Sequence[int] | None = None, bound: bool = False, seed: int = 0
) -> NetworkForms:
    """Low-rank products of all layers, whose groups and ranks minimize the largest relative error.

    Parameters
    ----------
    model
        Any module; it is not changed.
    share
        Coefficients of all its layers together, as a share of the dense ones.
    groups
        Numbers of groups to choose from; every divisor of a layer's input channels by default.
    bound
        Whether the error is the published bound, which grows with ``sqrt(k)``. The released program leaves that out.
    seed
        Seed of the allocation's random starts.

    Raises
    ------
    RequestError
        If no layer can be decomposed, the share is not above 0 and below 1, or it does not suffice for rank 1.

    Examples
    --------
    >>> import torch
    >>> from octavo.methods.factorize.alds_network import alds_forms
    >>> _ = torch.manual_seed(0)
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 32, 3))
    >>> found = alds_forms(net, 0.4)
    >>> sorted(found.forms), found.allocation.elements <= 0.4 * (8 * 16 * 9 + 16 * 32 * 9)
    (['0.weight', '2.weight'], True)
    """
    if not 0 < share < 1:
        raise RequestError(f"share: is {share}; give a number above 0 and below 1, such as 0.5")
    layers = ranked_layers(model, bound=bound)
    if not layers:
        raise RequestError(
            f"{type(model).__name__}: has no layer to decompose; give a module with layers of 512 weights"
        )
    allocation = allocate_ranks(
        layers, int(share * sum(layer.dense for layer in layers.values())), groups=groups, seed=seed
    )
    forms = chosen_forms(layers, allocation.choices)
    return NetworkForms(forms, {site.name: site.layout for site in _sites(model) if site.name in forms}, allocation)


def chosen_forms(layers: Mapping[str, RankedLayer], choices: Mapping[str, RankChoice | None]) -> dict[str, Form]:
    """The truncated SVDs of chosen groups and ranks, without the layers that stay dense."""
    return {
        name: decomposed(layers[name].matrix, choice.groups, choice.rank)
        for name, choice in choices.items()
        if choice is not None
    }


def _sites(model: nn.Module) -> list[Site]:
    return [site for site in from_module(model).sites()[0] if ALDS().accepts(site)]
