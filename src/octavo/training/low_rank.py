"""Layers that are low-rank by design, as in Greenformers' Low-Rank Transformer.

A linear layer becomes ``x -> E x -> D E x + b`` (LED), a convolution one with ``rank`` filters and one of 1 x 1 (CED),
with nothing between them. Unlike :func:`octavo.training.formed`, which trains factors inside an unchanged module, the
product is never computed. So time and memory of training shrink too.

Source: Cahyawijaya (2021), arXiv 2108.10808; semi-NMF by Ding, Li and Jordan (2010).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import RequestError
from octavo.methods.factorize.factors import whitened
from octavo.training.computed import owners

#: Initialisation of the factors: random, or from the layer's weights.
STARTS = ("random", "svd", "semi-nmf")


def low_rank(module: nn.Module, rank: int | float, start: str = "random") -> nn.Module:
    """Replace linear layers and convolutions inside ``module`` by pairs of thin layers, in place.

    Grouped convolutions, layers that share a parameter with another one (as a tied head does), and layers whose pair
    would not have fewer weights, are unchanged. What is frozen stays so.

    Parameters
    ----------
    rank
        Rank of every pair; a number below 1 is a share of the rank at which the pair has as many weights as the layer,
        ``in * out / (in + out)``.
    start
        One of :data:`STARTS`.

    Raises
    ------
    RequestError
        If the rank or start is invalid, or the module itself is a layer, which cannot be replaced in place. If a layer
        has hooks, which its pair would not have; then nothing is replaced.
    """
    if start not in STARTS:
        raise RequestError(f"low-rank layers: start {start!r} is not known; choose from {', '.join(STARTS)}")
    if not (0 < rank < 1 or (rank >= 1 and int(rank) == rank)):
        raise RequestError(f"low-rank layers: the rank is {rank!r}; it must be a share below 1 or a whole number")
    if _thinnable(module):
        raise RequestError(
            f"{type(module).__name__}: a layer cannot be replaced in place; give the module that holds it"
        )
    ranks: dict[nn.Module, int] = {}
    held = owners(module)
    for name, layer in module.named_modules():
        shared = any(held[id(parameter)] > 1 for parameter in layer.parameters(recurse=False))
        if _thinnable(layer) and not shared and (thin := _rank_of(layer, rank)) is not None:
            _refuse_hooks(name, layer)
            ranks[layer] = thin
    # A layer used in two places stays one layer.
    made = {layer: _pair(layer, thin, start) for layer, thin in ranks.items()}
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if child in made:
                setattr(parent, name, made[child])
    return module


def semi_nmf(weight: Tensor, rank: int, iterations: int = 100) -> tuple[Tensor, Tensor]:
    """``weight ~ F G^T`` with ``G >= 0``: ``F`` by least squares and ``G`` by the multiplicative rule, alternately.

    ``G <- G * sqrt(((W^T F)+ + G (F^T F)-) / ((W^T F)- + G (F^T F)+))``, with ``A+`` and ``A-`` the positive and the
    negative part of ``A``; no step increases the error.

    Returns
    -------
    F, G
        (rows, rank) and (columns, rank).
    """
    tiny, matrix = 1e-12, weight.double()
    # Initialised with the magnitudes of the right singular vectors, since zeros would never change.
    right = whitened(weight, most=rank).right.double()
    right = torch.nn.functional.pad(right, (0, 0, 0, rank - len(right)), value=1.0)
    g = right.t().abs() / right.norm(dim=1).clamp_min(tiny) + 0.2 / len(right.t()) ** 0.5
    for _ in range(iterations):
        f = _fitted(matrix, g)
        cross, gram = matrix.t() @ f, f.t() @ f
        g = g * ((cross.relu() + g @ (-gram).relu() + tiny) / ((-cross).relu() + g @ gram.relu() + tiny)).sqrt()
    return _fitted(matrix, g).to(weight), g.to(weight)


def _fitted(matrix: Tensor, g: Tensor) -> Tensor:
    """``W G (G^T G)^-1`` with a small ridge, since two columns of ``G`` may become equal."""
    gram = g.t() @ g
    gram.diagonal().add_(1e-12 * gram.diagonal().mean())
    return torch.linalg.solve(gram, (matrix @ g).t()).t()


def _thinnable(layer: nn.Module) -> bool:
    # The weights of subclasses may be read outside of their forward pass.
    return type(layer) is nn.Linear or (
        type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and getattr(layer, "groups", 1) == 1
    )


def _rank_of(layer: Any, rank: int | float) -> int | None:
    """The rank of a layer's pair; None if the pair would not have fewer weights."""
    rows, columns = layer.weight.flatten(1).shape
    even = rows * columns / (rows + columns)
    thin = max(1, round(rank * even)) if rank < 1 else int(rank)
    return thin if thin < even else None


def _refuse_hooks(name: str, layer: nn.Module) -> None:
    if layer._forward_pre_hooks or layer._forward_hooks or layer._backward_pre_hooks or layer._backward_hooks:
        raise RequestError(f"{name!r}: has hooks, which its pair would not have; remove them, and set them afterwards")


@torch.no_grad()
def _pair(layer: Any, thin: int, start: str) -> nn.Module:
    weight = layer.weight.flatten(1)
    rows, columns = weight.shape
    bias, place = layer.bias is not None, {"device": weight.device, "dtype": weight.dtype}
    first: Any
    second: Any
    if isinstance(layer, nn.Linear):
        first, second = nn.Linear(columns, thin, False, **place), nn.Linear(thin, rows, bias, **place)
    else:
        kind = type(layer)
        first = kind(
            layer.in_channels, thin, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
            bias=False, padding_mode=layer.padding_mode, **place,
        )  # fmt: skip
        second = kind(thin, rows, 1, bias=bias, **place)
    if start != "random":
        left, right = _factors(weight, thin, start)
        first.weight.copy_(right.view_as(first.weight))
        second.weight.copy_(left.reshape(second.weight.shape))
        if bias:
            second.bias.copy_(layer.bias)
    for own in (first.weight, second.weight):
        own.requires_grad_(layer.weight.requires_grad)
    if bias:
        second.bias.requires_grad_(layer.bias.requires_grad)
    return nn.Sequential(first, second).train(layer.training)


def _factors(weight: Tensor, rank: int, start: str) -> tuple[Tensor, Tensor]:
    if start == "semi-nmf":
        f, g = semi_nmf(weight, rank)
        return f, g.t()
    found = whitened(weight, most=rank)
    # A weight of lower rank has fewer components: the others start at zero on one side only, so that they can learn.
    left, right = weight.new_zeros(len(weight), rank), torch.randn(rank, weight.shape[1]) / weight.shape[1] ** 0.5
    have = min(rank, len(found.right))
    left[:, :have], right[:have] = found.left[:, :have], found.right[:have]
    return left, right.to(weight)
