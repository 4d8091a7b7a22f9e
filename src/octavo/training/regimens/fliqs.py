"""FLIQS: formats of all layers are searched while the net trains, in one run and without retraining."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from octavo.errors import RequestError
from octavo.forms import Form
from octavo.methods.policies import Reinforce, Rollout
from octavo.sources.batches import Batch
from octavo.training.computed import Rounded, chains
from octavo.training.losses import LossFunction
from octavo.training.masks import maskable
from octavo.training.number_formats import NumberFormat, rounding
from octavo.training.regimens.base import Regimen, regimen

SOURCE = "FLIQS (Dotzel et al., 2023, arXiv 2308.03290)"


@regimen("fliqs", source=SOURCE)
@dataclass
class FormatSearch(Regimen):
    """Every layer draws a format at every step, and a policy learns which formats are worth their bits.

    Weights are shared by all formats and rounded straight through. The reward of a step is ``-loss - pressure *
    |cost / target - 1|``, where the cost counts the bits of all weights and scales. REINFORCE moves the
    policy. A rising price on its entropy drives it to a decision before the end, so the net needs no second training.
    With a single format this is quantization-aware training.

    Parameters
    ----------
    formats
        Formats that a layer may have (:class:`octavo.training.number_formats.NumberFormat`).
    bits
        The mean of bits per weight that is aimed at; by default the mean of the formats' bits.
    assigned
        Formats of single layers by the name of their weight, which are not searched.
    names
        Globs of weights that take part; by default all matrices and kernels.
    pressure
        What it costs to miss the target by its whole.
    delay
        The share of the steps in which formats are drawn evenly, before the policy learns.
    entropy
        The price of a nat of the policy's entropy at the end; it rises linearly from zero.
    rate
        Learning rate of the policy.

    Examples
    --------
    >>> from octavo.training import cross_entropy, fit
    >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> search = FormatSearch(("int4", "int8"), bits=6)
    >>> batch = (torch.randn(32, 8), torch.randint(0, 2, (32,)))
    >>> _ = fit(net, lambda epoch: [batch] * 20, cross_entropy, regimen=search)
    >>> sorted(search.chosen), sorted(search.forms(net))
    (['0.weight', '2.weight'], ['0.weight', '2.weight'])
    """

    formats: tuple[str, ...] = ("int4", "int8")
    bits: float | None = None
    assigned: Mapping[str, str] = field(default_factory=dict)
    names: tuple[str, ...] | None = None
    pressure: float = 2.0
    delay: float = 0.2
    entropy: float = 0.1
    rate: float = 0.05
    _parts: dict[str, tuple[Rounded, tuple[int, int]]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.formats, str):
            raise RequestError(f"fliqs: formats is {self.formats!r}; give several names, or one as ({self.formats!r},)")
        self._formats = [NumberFormat(name) for name in self.formats]
        self._assigned = {name: NumberFormat(chosen) for name, chosen in self.assigned.items()}
        if not self._formats:
            raise RequestError("fliqs: formats has none; give at least one, such as int4")
        low, high = min(part.bits for part in self._formats), max(part.bits for part in self._formats)
        if self.bits is not None and not (isinstance(self.bits, int | float) and low <= self.bits <= high):
            raise RequestError(f"fliqs: bits is {self.bits!r}; the formats have {low} to {high}")
        if not 0 <= self.delay < 1 or self.pressure < 0 or self.entropy < 0 or self.rate <= 0:
            raise RequestError(
                f"fliqs: delay is {self.delay!r}, pressure {self.pressure!r}, entropy {self.entropy!r} and rate "
                f"{self.rate!r}; give a share below 1, two numbers of at least 0, and one above 0"
            )

    @classmethod
    def suited_to(cls, model: nn.Module) -> Self:
        """Any model will do."""
        return cls()

    @property
    def chosen(self) -> dict[str, str]:
        """The most probable format of every layer, by the name of its weight."""
        self._refuse_unbegun()
        return {name: part.settled.name for name, (part, _) in self._parts.items()}

    @property
    def certainty(self) -> float:
        """The probability of the most probable format, a mean over the layers that are searched."""
        self._refuse_unbegun()
        return float(self._logits.detach().softmax(1).amax(1).mean()) if self._searched else 1.0

    def begin(self, model: nn.Module, steps: int) -> None:
        """Round all weights, and start from even odds."""
        found = maskable(model, self.names)
        if unknown := sorted(self._assigned.keys() - found.keys()):
            raise RequestError(f"fliqs: assigned names {unknown[0]!r}; choose from {', '.join(list(found)[:5])} ...")
        self._searched = [name for name in found if name not in self._assigned]
        first = dict.fromkeys(self._searched, self._formats[0])
        self._parts = rounding(model, list(found), {**first, **self._assigned})
        # Bits (layers, formats) of what is searched, and of the rest.
        costs = [[part.cost(self._parts[name][1]) for part in self._formats] for name in self._searched]
        self._costs = torch.tensor(costs, dtype=torch.float64).reshape(len(costs), len(self._formats))
        self._fixed = sum(chosen.cost(self._parts[name][1]) for name, chosen in self._assigned.items())
        self._steps, self._drawn = steps, torch.zeros(len(self._searched), dtype=torch.long)
        self._logits = torch.zeros(self._costs.shape, requires_grad=True)
        self._learner = Reinforce(torch.optim.Adam([self._logits], self.rate), memory=0.99)
        self._lost = math.nan
        self._settle()

    @property
    def _target(self) -> float:
        bits = sum(part.bits for part in self._formats) / len(self._formats) if self.bits is None else self.bits
        low, high = (part.bits for part in (min(self._formats, key=_bits), max(self._formats, key=_bits)))
        share = (bits - low) / (high - low) if high > low else 0.0
        return float(self._costs.amin(1).sum().lerp(self._costs.amax(1).sum(), share)) + self._fixed

    def before_step(self, step: int) -> None:
        """Draw formats: evenly at first, then by the policy."""
        self._refuse_unbegun()
        if self._searched:
            odds = self._logits.detach().softmax(1)
            self._drawn = torch.multinomial(odds, 1)[:, 0]
        for name, index in zip(self._searched, self._drawn.tolist(), strict=True):
            self._parts[name][0].drawn = self._formats[index]

    def loss(self, model: nn.Module, batch: Batch, loss: LossFunction) -> Tensor:
        """The task's loss, from which the reward is made."""
        value = loss(model, batch)
        self._lost = float(value.detach())
        return value

    def after_step(self, step: int) -> None:
        """Let the policy learn from the loss and the cost of what was drawn."""
        if not self._searched or len(self._formats) == 1 or step < self.delay * self._steps:
            return
        rows = torch.arange(len(self._drawn))
        cost = float(self._costs[rows, self._drawn].sum()) + self._fixed
        reward = torch.zeros(len(rows))
        reward[-1] = -self._lost - self.pressure * abs(cost / self._target - 1)
        logs = self._logits.log_softmax(1)
        rising = (step + 1) / self._steps - self.delay
        price = self.entropy * rising / (1 - self.delay)
        entropy = -(logs.exp() * logs).sum(1).mean()
        self._learner.update([Rollout(self._drawn, logs[rows, self._drawn] / len(rows), reward)], price * entropy)
        self._settle()

    def _settle(self) -> None:
        for name, index in zip(self._searched, self._logits.argmax(1).tolist(), strict=True):
            self._parts[name][0].settled = self._formats[index]

    def state(self) -> dict[str, Any]:
        """The policy and what moves it."""
        learner = self._learner
        baseline = torch.zeros(0) if learner.baseline is None else learner.baseline
        return {"logits": self._logits.detach(), "adam": learner.optimizer.state_dict(), "baseline": baseline}

    def resume(self, state: dict[str, Any]) -> None:
        """Continue with this policy."""
        with torch.no_grad():
            self._logits.copy_(state["logits"])
        self._learner.optimizer.load_state_dict(state["adam"])
        self._learner.baseline = state["baseline"] if len(state["baseline"]) else None
        self._settle()

    def forms(self, model: nn.Module) -> dict[str, Form]:
        """All weights in the formats that were chosen."""
        found = chains(model, Rounded, self.name)
        return {name: chain[0].form(chain.original.cpu(), chain[0].settled) for name, chain in found.items()}

    def _refuse_unbegun(self) -> None:
        if not self._parts:
            raise RequestError("fliqs: nothing was trained yet; give the regimen to octavo.training.fit first")


def _bits(chosen: NumberFormat) -> int:
    return chosen.bits
