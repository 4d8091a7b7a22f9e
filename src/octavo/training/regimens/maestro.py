"""Ordered dropout on factors: a network trained once, whose layers can then be cut to any rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from octavo.errors import RequestError
from octavo.forms import Dense, LowRank
from octavo.methods.factorize.factors import whitened
from octavo.sources.batches import Batch
from octavo.sources.sites import Layout
from octavo.training.computed import refuse_shared, usual_layouts
from octavo.training.formed import unparametrized
from octavo.training.losses import LossFunction, divergence, logits_of, outputs_of
from octavo.training.regimens.base import Regimen, regimen
from octavo.training.widths import factorizable, ladder

SOURCE = "Maestro (Horvath, Laskaridis, Rajput & Wang, 2024, ICML; arXiv 2308.14929)"

#: Added under the roots of the group lasso, whose slope at zero would be infinite.
_EPS = 1e-12


@regimen("maestro", source=SOURCE)
@dataclass
class OrderedDropout(Regimen):
    """Train ``W = U V^T`` such that its first columns matter most.

    Every layer starts at its full inner width ``min(rows, columns)``, with the SVD of its own initial weights split as
    ``U S^(1/2)`` and ``V S^(1/2)``. Each step draws one layer and one width ``b``, all pairs with equal probability.
    That layer runs with its first ``b`` columns, and every other layer with all of its columns. The hierarchical group
    lasso ``pressure * sum_i (|U[:, i:]| + |V[:, i:]|)`` of all layers is added to the loss; it penalizes the last
    columns most. After every epoch the last columns are dropped permanently while ``|U[:, i:]| |V[:, i:]| < threshold
    |U| |V|``. For a linear map this finds the ordered SVD of ``W C^(1/2)``, where ``C`` is the second moment of the
    inputs.

    With ``distil`` every step runs the network twice, whole and narrowed. The loss is ``loss(whole) + KL(whole ||
    narrowed)`` of their output distributions, with that of the whole as fixed target.

    Ranks fall within about 500 steps at the defaults and a learning rate of 3e-3 with AdamW, or of 0.1 with momentum.
    The authors' ``pressure`` of 1e-6 to 5e-3 needs many more steps at its lower end.

    Parameters
    ----------
    pressure
        Weight of the group lasso.
    threshold
        Share of a layer's product of norms below which its last columns are dropped.
    growth
        Ratio of successive widths to draw, from 1 up to all columns; 1 draws every width, as in the paper. A larger one
        draws narrow widths more often, at the expense of the whole network.
    distil
        Whether the narrowed network learns from the whole one, and the whole one from the labels.
    names
        Weights to factorize; by default those of all linear layers and of all convolutions without groups.
    seed
        Seed of the draws.
    """

    pressure: float = 1e-3
    threshold: float = 1e-2
    growth: float = 1.0
    distil: bool = False
    names: tuple[str, ...] | None = None
    seed: int = 0
    _layers: dict[str, _Ordered] = field(default_factory=dict, init=False, repr=False)
    _forms: dict[str, LowRank] = field(default_factory=dict, init=False, repr=False)
    _generator: torch.Generator = field(default_factory=torch.Generator, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.pressure < 0 or not 0 <= self.threshold < 1 or self.growth < 1:
            raise RequestError(
                f"ordered dropout: pressure is {self.pressure!r}, threshold {self.threshold!r} and growth "
                f"{self.growth!r}; they must be at least 0, from 0 to below 1, and at least 1"
            )

    def begin(self, model: nn.Module, steps: int) -> None:
        """Replace every weight by its factors."""
        self._generator.manual_seed(self.seed)
        # A weight that two modules share has two names here, so that it is refused by either.
        known, names = dict(model.named_parameters(remove_duplicate=False)), self.names or factorizable(model)
        if not names:
            raise RequestError(
                f"{type(model).__name__}: has no linear layer and no convolution without groups; give a model with "
                "such layers"
            )
        for name in names:
            if name not in known or known[name].ndim < 2:
                raise RequestError(
                    f"{type(model).__name__}: has no matrix {name!r} that can be factorized; name one of its weights"
                )
        refuse_shared(model, names)
        for name, layout in usual_layouts(model, names).items():
            prefix, _, parameter = name.rpartition(".")
            self._layers[name], owner = _Ordered(known[name], layout), model.get_submodule(prefix)
            kind = type(owner)
            parametrize.register_parametrization(owner, parameter, self._layers[name])
            self._layers[name].chain.append(getattr(owner.parametrizations, parameter))
            if kind is nn.Linear:
                # PyTorch made a class for this module alone; it is removed together with the factors.
                type(owner).forward = _linear

    def before_step(self, step: int) -> None:
        """Draw a layer and a width."""
        pairs = [(layer, width) for layer in self._layers.values() for width in ladder(layer.rank, self.growth)]
        layer, width = pairs[int(torch.randint(len(pairs), (), generator=self._generator))]
        layer.width = width

    def loss(self, model: nn.Module, batch: Batch, loss: LossFunction) -> Tensor:
        """The loss of the narrowed network, or of both, plus the group lasso."""
        return super().loss(model, batch, partial(self._distilled, loss=loss) if self.distil else loss)

    def _distilled(self, model: nn.Module, batch: Batch, loss: LossFunction) -> Tensor:
        layer, width = next((layer, layer.width) for layer in self._layers.values() if layer.width)
        layer.width = None
        outputs: list[Tensor] = []
        # The loss runs the whole network and its outputs are the target, so one pass gives both.
        handle = model.register_forward_hook(lambda module, args, result: outputs.append(logits_of(result)))
        try:
            value = loss(model, batch)
        finally:
            handle.remove()
        layer.width = width
        inputs = batch[0] if isinstance(batch, tuple | list) else batch
        return value + divergence(outputs[0].detach(), outputs_of(model, inputs))

    def penalty_of(self, model: nn.Module) -> Tensor | None:
        """The hierarchical group lasso of all layers."""
        if not self.pressure:
            return None
        norms = [(layer.suffixes(0).sum() + layer.suffixes(1).sum()) for layer in self._layers.values()]
        return self.pressure * torch.stack(norms).sum()

    def after_step(self, step: int) -> None:
        """Restore all columns of all layers."""
        for layer in self._layers.values():
            layer.width = None

    def abort(self, model: nn.Module) -> None:
        """Restore all columns, whatever was drawn."""
        for layer in self._layers.values():
            layer.width = None

    def after_epoch(self, number: int) -> None:
        """Drop the columns that hardly matter."""
        for layer in self._layers.values():
            layer.shrink(self.threshold)

    def state(self) -> dict[str, Any]:
        """Remaining columns, and the state of the generator."""
        return {"ranks": self.ranks, "generator": self._generator.get_state()}

    def resume(self, state: dict[str, Any]) -> None:
        """Continue with the given columns and draws."""
        self._generator.set_state(state["generator"])
        for name, layer in self._layers.items():
            layer.rank = int(state["ranks"][name])

    @property
    def ranks(self) -> dict[str, int]:
        """Remaining columns of every layer."""
        return {name: layer.rank for name, layer in self._layers.items()} or {
            name: form.left.shape[1] for name, form in self._forms.items()
        }

    def forms(self, model: nn.Module) -> dict[str, LowRank]:  # type: ignore[override]
        """The factors; :func:`truncated` cuts them. The model only keeps the products."""
        for name, layer in self._layers.items():
            left, right = (part.detach().clone() for part in layer.parts())
            self._forms[name] = LowRank(Dense(left), Dense(right))
            prefix, _, parameter = name.rpartition(".")
            unparametrized(model.get_submodule(prefix), parameter)
        self._layers = {}
        return dict(self._forms)


class _Ordered(nn.Module):
    """The parametrization: its originals are ``U`` and ``V^T`` at full width; it returns the narrowed product."""

    def __init__(self, weight: Tensor, layout: Layout) -> None:
        super().__init__()
        self.layout, self.shape = layout, tuple(weight.shape)
        self.rank = min(self.layout.matrix_shape(self.shape))
        self.width: int | None = None
        #: The module that holds the factors; in a list, since it also holds this module.
        self.chain: list[Any] = []

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The SVD of the weight, split evenly."""
        matrix = self.layout.to_matrix(weight.detach())
        found = whitened(matrix)
        left, right = matrix.new_zeros(len(matrix), self.rank), matrix.new_zeros(self.rank, matrix.shape[1])
        have = min(self.rank, len(found.right))
        left[:, :have], right[:have] = found.left[:, :have], found.right[:have]
        return left, right

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.layout.from_matrix(left[:, : self.used] @ right[: self.used], self.shape)

    @property
    def used(self) -> int:
        """Columns that run in this step."""
        return self.width or self.rank

    def parts(self) -> tuple[Tensor, Tensor]:
        """``U`` and ``V^T``, without the columns that were dropped."""
        return self.chain[0].original0[:, : self.rank], self.chain[0].original1[: self.rank]

    def suffixes(self, side: int) -> Tensor:
        """The norms of columns ``i`` and after, for every ``i``."""
        squares = self.parts()[side].square().sum(side)
        return (squares.flip(0).cumsum(0).flip(0) + _EPS).sqrt()

    @torch.no_grad()
    def shrink(self, threshold: float) -> None:
        """Drop last columns while they hardly matter; at least one is kept."""
        importance = self.suffixes(0) * self.suffixes(1)
        self.rank = max(1, int((importance >= threshold * importance[0]).sum()))


def _linear(layer: Any, x: Tensor) -> Tensor:
    """``(x V) U^T + bias``, cheaper than multiplying the factors out."""
    chain = layer.parametrizations.weight
    used = chain[0].used
    return functional.linear(functional.linear(x, chain.original1[:used]), chain.original0[:, :used], layer.bias)
