"""Turbo-VBI: Gaussian weights under a prior whose support comes in runs, and which of them are needed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from octavo.errors import RequestError
from octavo.forms import Dense, Form, Sparse
from octavo.training.clustered_support import SupportPrior, inferred
from octavo.training.regimens.base import Regimen, regimen
from octavo.training.widths import factorizable

SOURCE = "Turbo-VBI (Xia, Tsang & Lau, 2023, arXiv 2302.10483)"

#: Logarithm of the first variances, in units of a layer's mean square.
_START = -6.0
#: Added under the root of a variance, whose slope at zero would be infinite.
_FLOOR = 1e-12


@regimen("turbo-vbi", source=SOURCE)
@dataclass
class TurboVBI(Regimen):
    """Variational Gaussian weights; those whose support is unlikely are removed, and neighbours decide together.

    Weights are ``N(mu, sigma^2)``, where ``mu`` is the model's own parameter. Each example draws its own noise at the
    outputs of a layer (local reparameterisation). A step minimises ``loss + KL(q(w) || N(0, 1 / <rho>)) / examples``.
    Every few steps precisions ``rho`` and the support ``s`` follow in closed form, by turns with messages along the
    weights of every output (:mod:`octavo.training.clustered_support`). For images the inputs of an output are in
    their order, row by row; runs mean nothing if inputs are permuted.

    The KL rises linearly at first. Before the last steps, weights with ``q(s = 1) < 1/2`` and those of tiny mean
    become zero, and the others are trained without noise. What is handed over is sparse.

    Two things differ from the source. Precisions count in units of a layer's mean square at the beginning, so that one
    prior serves all layers. Variances are trained by an Adam of their own, since rates for weights do not suit them.

    Parameters
    ----------
    examples
        Number of training examples; a smaller number gives the prior more weight.
    prior
        The prior of weights, precisions and support.
    names
        Weights that take part; by default those of all linear layers and of all convolutions without groups.
    warmup, tuned
        Shares of the steps: the first, in which the KL rises, and the last, in which survivors are tuned.
    every
        Steps from one update of precisions and support to the next.
    smallest
        Weights whose mean is below this, in units of the layer's root mean square, become zero in any case.
    rate
        Learning rate of logarithms of variances.
    """

    examples: int
    prior: SupportPrior = field(default_factory=SupportPrior)
    names: tuple[str, ...] | None = None
    warmup: float = 0.25
    tuned: float = 0.25
    every: int = 50
    smallest: float = 0.01
    rate: float = 0.02
    _weights: dict[str, _Gaussian] = field(default_factory=dict, init=False, repr=False)
    _share: float = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.examples < 1 or self.every < 1:
            raise RequestError(
                f"turbo-vbi: examples is {self.examples!r} and every {self.every!r}; both must be at least 1"
            )
        if min(self.warmup, self.tuned) < 0 or self.warmup + self.tuned >= 1:
            raise RequestError(
                f"turbo-vbi: warmup is {self.warmup!r} and tuned {self.tuned!r}; they are shares of the steps, and "
                "together must be below 1"
            )

    @classmethod
    def suited_to(cls, model: nn.Module) -> Self:
        """As if there were ten examples for every weight, so that data outweigh the prior."""
        return cls(examples=10 * sum(weight.numel() for weight in model.parameters()))

    def begin(self, model: nn.Module, steps: int) -> None:
        """Give every weight a variance, and every layer its noise."""
        names, layers = self.names or factorizable(model), dict(model.named_modules())
        if not names:
            raise RequestError(
                f"{type(model).__name__}: has no linear layer and no convolution without groups; give a model with "
                "such layers"
            )
        for name in names:
            prefix, _, leaf = name.rpartition(".")
            if leaf != "weight" or not isinstance(layers.get(prefix), _LAYERS):
                raise RequestError(
                    f"{type(model).__name__}: {name!r} is not the weight of a linear layer or convolution; name one"
                )
        for name in names:
            self._weights[name] = _Gaussian(layers[name.rpartition(".")[0]], self.prior)
        self._adam = torch.optim.Adam([own.log_variance for own in self._weights.values()], self.rate)
        self._rise = max(1, round(self.warmup * steps))
        self._last_noise = max(0, round((1 - self.tuned) * steps) - 1)

    def before_step(self, step: int) -> None:
        """Let the KL rise."""
        self._share = min(1.0, (step + 1) / self._rise)

    def penalty_of(self, model: nn.Module) -> Tensor | None:
        """The KL of all weights, per example; none while survivors are tuned."""
        parts = [own.divergence() for own in self._weights.values() if own.kept is None]
        return self._share / self.examples * torch.stack(parts).sum() if parts else None

    def after_backward(self, step: int) -> None:
        """Train the variances."""
        self._adam.step()
        self._adam.zero_grad()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Update beliefs where it is time, prune once, and keep zeros zero."""
        for own in self._weights.values():
            if step % self.every == 0 or step == self._last_noise:
                own.believe()
            if step == self._last_noise:
                own.prune(self.smallest)
            if own.kept is not None:
                own.layer.weight.mul_(own.kept)

    def abort(self, model: nn.Module) -> None:
        """End the noise."""
        for own in self._weights.values():
            own.quiet()

    def state(self) -> dict[str, Any]:
        """Variances and beliefs."""
        return {"weights": {name: own.state() for name, own in self._weights.items()}, "adam": self._adam.state_dict()}

    def resume(self, state: dict[str, Any]) -> None:
        """Continue with these variances and beliefs."""
        for name, own in self._weights.items():
            own.resume(state["weights"][name])
        self._adam.load_state_dict(state["adam"])

    def supports(self) -> dict[str, Tensor]:
        """``q(s = 1)`` of all weights as matrices, by name."""
        return {name: own.support.clone() for name, own in self._weights.items()}

    def forms(self, model: nn.Module) -> dict[str, Form]:
        """Masks and surviving weights."""
        found: dict[str, Form] = {}
        for name, own in self._weights.items():
            own.quiet()
            weight = own.layer.weight.detach().flatten(1)
            mask = torch.ones_like(weight, dtype=torch.bool) if own.kept is None else own.kept.flatten(1)
            found[name] = Sparse(mask.clone(), Dense(weight[mask][None]))
        return found


_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _Gaussian:
    """The weight of one layer: its own parameter is the mean."""

    def __init__(self, layer: Any, prior: SupportPrior) -> None:
        self.layer, self.prior = layer, prior
        weight = layer.weight.detach()
        self.unit = float(weight.square().mean().clamp_min(1e-12))
        self.log_variance = torch.full_like(weight, _START).requires_grad_()
        self.kept: Tensor | None = None
        self.believe()
        self._noise: RemovableHandle = layer.register_forward_hook(self._noisy)

    @torch.no_grad()
    def believe(self) -> None:
        """Update precisions and support."""
        squares = self.layer.weight.square() / self.unit + self.log_variance.exp()
        found = inferred(squares.flatten(1), self.prior)
        self.precision = found.precisions.mean.view_as(squares)
        self.support = found.support

    def divergence(self) -> Tensor:
        """``KL(q(w) || N(0, 1 / <rho>))``, summed over the weights."""
        squares = self.layer.weight.square() / self.unit + self.log_variance.exp()
        return 0.5 * (self.precision * squares - 1 - self.precision.log() - self.log_variance).sum()

    def prune(self, smallest: float) -> None:
        """Choose what is kept, and end the noise."""
        weight = self.layer.weight.detach()
        large = weight.square() >= smallest**2 * self.unit
        self.kept = (self.support >= 0.5).view_as(weight) & large
        self.quiet()

    def quiet(self) -> None:
        """End the noise."""
        self._noise.remove()

    def state(self) -> dict[str, Any]:
        """All but the mean, which is in the model."""
        return {
            "log_variance": self.log_variance.detach(), "precision": self.precision, "support": self.support,
            "kept": self.kept, "unit": self.unit,
        }  # fmt: skip

    def resume(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state`."""
        self.log_variance.data.copy_(state["log_variance"])
        self.precision, self.support = state["precision"], state["support"]
        self.kept, self.unit = state["kept"], state["unit"]
        if self.kept is not None:
            self.quiet()

    def _noisy(self, layer: Any, given: tuple[Tensor, ...], result: Tensor) -> Tensor:
        """Noise at the outputs with the variance that the weights' own would cause there."""
        if not layer.training:
            return result
        squares, variance = given[0].square(), self.log_variance.exp() * self.unit
        if isinstance(layer, nn.Linear):
            spread = functional.linear(squares, variance)
        else:
            spread = layer._conv_forward(squares, variance, None)
        return result + (spread + _FLOOR).sqrt() * torch.randn_like(result)
