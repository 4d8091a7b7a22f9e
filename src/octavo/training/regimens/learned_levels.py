"""Weights that share a few levels, which train: clustering, and differentiable quantization."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from octavo.errors import RequestError
from octavo.forms import Codebook, Form
from octavo.sources.sites import Layout
from octavo.training.computed import chains, refuse_shared, usual_layouts
from octavo.training.masks import maskable
from octavo.training.regimens.base import Regimen, regimen

PLACES = ("quantiles", "linear")


@regimen("learned-levels", source="Polino et al. (2018), arXiv 1802.05668; Han et al. (2015), arXiv 1510.00149")
@dataclass
class LearnedLevels(Regimen):
    """Every pass computes with ``values[k]``, the nearest of a few values that a weight matrix has.

    The gradient of a value is the sum over the weights that have it. With ``weights`` it also moves each weight, which
    then may come nearer to another value. Without, only values move, which is differentiable quantization.

    Parameters
    ----------
    levels
        Values of a matrix, from 2 to 256.
    places
        Where values begin: at ``quantiles`` of the weights, or ``linear`` between the smallest and the largest.
    weights
        Whether weights train as well.
    zeros
        Whether weights that are zero in the beginning stay zero, as after pruning. Then zero is one of the values.
    names
        Globs of the weights; by default those of all linear layers, convolutions and embeddings.

    Raises
    ------
    RequestError
        If the number of levels is out of range, or a place is not known.
    """

    levels: int = 16
    places: str = "quantiles"
    weights: bool = True
    zeros: bool = False
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.levels, bool) or not isinstance(self.levels, int) or not 2 <= self.levels <= 256:
            raise RequestError(f"learned levels: levels is {self.levels!r}; give a whole number from 2 to 256")
        if self.places not in PLACES:
            raise RequestError(f"learned levels: places is {self.places!r}; choose from {', '.join(PLACES)}")

    def begin(self, model: nn.Module, steps: int) -> None:
        """Place the levels, and compute weights from them."""
        found = maskable(model, self.names)
        refuse_shared(model, found)
        for name, layout in usual_layouts(model, found).items():
            weight, (prefix, _, leaf) = found[name], name.rpartition(".")
            kept = weight.detach() != 0 if self.zeros else torch.ones_like(weight, dtype=torch.bool)
            held = weight.detach()[kept]
            count = self.levels - self.zeros
            if not held.numel():
                held = weight.detach().flatten()
            if self.places == "linear":
                values = torch.linspace(float(held.min()), float(held.max()), count).to(held)
            else:
                order = held.float().sort().values
                values = order[((torch.arange(count) + 0.5) / count * len(order)).long()].to(held)
            weight.requires_grad_(self.weights and weight.requires_grad)
            parametrize.register_parametrization(model.get_submodule(prefix), leaf, _Levels(values, kept, layout))

    def forms(self, model: nn.Module) -> dict[str, Form]:
        """Codes and values of all weights."""
        found = chains(model, _Levels, self.name)
        return {name: chain[0].form(chain.original.detach()) for name, chain in found.items()}


class _Levels(nn.Module):
    """The nearest value of every weight that is kept; zero for others."""

    kept: Tensor

    def __init__(self, values: Tensor, kept: Tensor, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.values = nn.Parameter(values.clone())
        self.register_buffer("kept", kept)

    def forward(self, weight: Tensor) -> Tensor:
        values, codes = self._nearest(weight)
        # The values' own gradient, and that of the identity for the weight.
        return (values[codes] + (weight - weight.detach())) * self.kept

    def _nearest(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        values = self.values.sort().values
        middles = ((values[1:] + values[:-1]) / 2).detach()
        return values, torch.bucketize(weight.detach(), middles)

    @torch.no_grad()
    def form(self, weight: Tensor) -> Codebook:
        """The codes (rows, columns) and their values, of which the first is zero if some weights are."""
        values, codes = self._nearest(weight)
        if not bool(self.kept.all()):
            values, codes = torch.cat([values.new_zeros(1), values]), (codes + 1) * self.kept
        return Codebook(self.layout.to_matrix(codes.to(torch.uint8)).cpu(), values.detach().float().cpu())
