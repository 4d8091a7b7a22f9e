"""Ordered dropout on factors: a network trained once, whose layers can then be cut to any rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from octavo.errors import RequestError
from octavo.forms import Dense, LowRank
from octavo.methods.factorize.factors import whitened
from octavo.sources.sites import Layout
from octavo.training.formed import unparametrized
from octavo.training.loop import Regimen
from octavo.training.losses import Batch, Loss, divergence, logits_of, outputs_of

SOURCE = "Maestro (Horvath, Laskaridis, Rajput & Wang, 2024, ICML; arXiv 2308.14929)"

#: Added under the roots of the group lasso, whose slope at zero would be infinite.
_EPS = 1e-12


@dataclass
class OrderedDropout(Regimen):
    """Train ``W = U V^T`` such that its first columns matter most.

    Every layer starts at its full inner width ``min(rows, columns)``, with the SVD of its own initial weights split as
    ``U S^(1/2)`` and ``V S^(1/2)``. Each step draws one layer and one width ``b``, all pairs with equal probability,
    and runs that layer with its first ``b`` columns and every other layer with all of its columns. The hierarchical
    group lasso ``pressure * sum_i (|U[:, i:]| + |V[:, i:]|)`` of all layers is added to the loss; it penalizes the last
    columns most. After every epoch the last columns are dropped permanently while ``|U[:, i:]| |V[:, i:]| < threshold
    |U| |V|``. For a linear map this finds the ordered SVD of ``W C^(1/2)``, where ``C`` is the second moment of the
    inputs.

    With ``distil`` every step runs the network twice, whole and narrowed. The loss is ``loss(whole) + KL(whole ||
    narrowed)`` of their output distributions, with that of the whole as fixed target.

    Parameters
    ----------
    pressure
        Weight of the group lasso.
    threshold
        Share of a layer's product of norms below which its last columns are dropped.
    growth
        Ratio of successive widths to draw, from 1 up to all columns; 1 draws every width. With fewer widths, each is
        drawn more often.
    distil
        Whether the narrowed network learns from the whole one, and the whole one from the labels.
    names
        Weights to factorize; by default those of all linear layers and of all convolutions without groups.
    seed
        Seed of the draws.
    """

    pressure: float = 1e-5
    threshold: float = 1e-3
    growth: float = 1.5
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
        known, names = dict(model.named_parameters()), self.names or factorizable(model)
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
            prefix, _, parameter = name.rpartition(".")
            self._layers[name] = _Ordered(known[name])
            parametrize.register_parametrization(model.get_submodule(prefix), parameter, self._layers[name])
            self._layers[name].chain.append(getattr(model.get_submodule(prefix).parametrizations, parameter))

    def before(self, step: int) -> None:
        """Draw a layer and a width."""
        pairs = [(layer, width) for layer in self._layers.values() for width in ladder(layer.rank, self.growth)]
        layer, width = pairs[int(torch.randint(len(pairs), (), generator=self._generator))]
        layer.width = width

    def loss(self, model: nn.Module, batch: Batch, loss: Loss) -> Tensor:
        """The loss of the narrowed network, or of both, plus the group lasso."""
        value = self._distilled(model, batch, loss) if self.distil else loss(model, batch)
        return value + self.pressure * self.penalty() if self.pressure else value

    def _distilled(self, model: nn.Module, batch: Batch, loss: Loss) -> Tensor:
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

    def penalty(self) -> Tensor:
        """The hierarchical group lasso of all layers."""
        norms = [(layer.suffixes(0).sum() + layer.suffixes(1).sum()) for layer in self._layers.values()]
        return torch.stack(norms).sum()

    def after(self, step: int) -> None:
        """Restore all columns of all layers."""
        for layer in self._layers.values():
            layer.width = None

    def epoch(self, number: int) -> None:
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


def factorizable(model: nn.Module) -> tuple[str, ...]:
    """Weights of all linear layers, and of all convolutions without groups."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return tuple(
        f"{name}.weight".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, kinds) and getattr(module, "groups", 1) == 1
    )


def ladder(rank: int, growth: float) -> list[int]:
    """Widths from 1 to ``rank``, each about ``growth`` times the last and at least one larger."""
    widths = [1]
    while widths[-1] < rank:
        widths.append(min(rank, max(widths[-1] + 1, round(widths[-1] * growth))))
    return widths


def truncated(forms: Mapping[str, LowRank], widths: Mapping[str, int]) -> dict[str, LowRank]:
    """The given number of first columns of the factors, without retraining.

    Raises
    ------
    RequestError
        If a layer has fewer columns.
    """
    cut = {}
    for name, width in widths.items():
        left, right = forms[name].left.dense(), forms[name].right.dense()
        if not 1 <= width <= left.shape[1]:
            raise RequestError(
                f"{name!r}: has {left.shape[1]} columns and cannot be cut to {width}; choose at most as many"
            )
        cut[name] = LowRank(Dense(left[:, :width].contiguous()), Dense(right[:width].contiguous()))
    return cut


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Recompute the statistics of batch normalization, since layers of another rank change means and variances.

    They become the averages over these inputs; everything else is unchanged.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    training = model.training
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    for inputs in batches:
        model(inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.train(training)


def allocated(
    curves: Mapping[str, Mapping[int, float]], shapes: Mapping[str, tuple[int, int]], budget: int
) -> dict[str, int]:
    """Widths of least loss whose weights fit a budget, chosen greedily by loss per weight.

    Parameters
    ----------
    curves
        For each layer, the loss on development data when only it is cut to a width. It is linear between measured
        widths, and only the lower convex hull counts.
    shapes
        Rows and columns of each layer. A width whose factors have at least as many weights as the matrix costs as much
        as the matrix.
    budget
        Total number of weights of all layers.

    Raises
    ------
    RequestError
        If a width of 1 everywhere does not fit.
    """

    def size(name: str, width: int) -> int:
        rows, columns = shapes[name]
        return min(width * (rows + columns), rows * columns)

    chosen = dict.fromkeys(curves, 1)
    total = sum(size(name, 1) for name in curves)
    if total > budget:
        raise RequestError(
            f"budget: {budget} weights are too few, as a width of 1 in all layers takes {total}; give at least that"
        )
    gains = []
    for name, curve in curves.items():
        hull = _hull([(size(name, width), loss, width) for width, loss in sorted(curve.items())])
        for (small, high, _), (large, low, width) in pairwise(hull):
            gains.append(((high - low) / (large - small), name, width))
        # Whatever remains is spent too, even if it no longer lowers the loss.
        gains.append((0.0, name, max(curve)))
    for _, name, wide in sorted(gains, reverse=True):
        # As wide as fits: the rest of the budget goes to the next best.
        for width in range(wide, chosen[name], -1):
            more = size(name, width) - size(name, chosen[name])
            if total + more <= budget:
                total, chosen[name] = total + more, width
                break
    return chosen


def _hull(points: list[tuple[int, float, int]]) -> list[tuple[int, float, int]]:
    """The falling part of the lower convex hull of (size, loss), with its widths."""
    hull: list[tuple[int, float, int]] = []
    for point in points:
        if hull and (point[0] <= hull[-1][0] or point[1] >= hull[-1][1]):
            continue
        while len(hull) > 1 and (hull[-1][1] - point[1]) * (hull[-1][0] - hull[-2][0]) >= (
            hull[-2][1] - hull[-1][1]
        ) * (point[0] - hull[-1][0]):
            hull.pop()
        hull.append(point)
    return hull


class _Ordered(nn.Module):
    """The parametrization: its originals are ``U`` and ``V^T`` at full width; it returns the narrowed product."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.layout, self.shape = Layout(), tuple(weight.shape)
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
        width = self.width or self.rank
        return self.layout.from_matrix(left[:, :width] @ right[:width], self.shape)

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
