"""Iterative pruning with rewinding: the search for lottery tickets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import RequestError
from octavo.forms import Form
from octavo.training.masks import WeightMasks
from octavo.training.regimens.base import Regimen, regimen

SOURCE = "The lottery ticket hypothesis (Frankle & Carbin, 2019, ICLR; arXiv 1803.03635)"


@regimen("rewinding", source=SOURCE)
@dataclass
class Rewinding(Regimen):
    """Train, mask the smallest weights, return all others to their initial values, and train again.

    A run of :func:`octavo.training.fit` is one round, and one regimen serves all rounds. The first round trains the
    whole model. Every further round begins by masking the share ``share`` of the weights that are left, those of
    smallest trained magnitude, and by returning everything else to the values from before the first round: weights,
    biases, and the statistics of normalizations. After ``r`` further rounds ``(1 - share)^r`` of the weights are left.

    Parameters
    ----------
    share
        Of the weights that are left, masked before every round but the first.
    across
        Whether all weights are ranked together instead of each for itself.
    names
        Globs of the weights; by default those of all linear layers, convolutions and embeddings.

    Examples
    --------
    >>> import torch
    >>> from octavo.training import cross_entropy, fit
    >>> model, ticket = torch.nn.Linear(16, 4), Rewinding(share=0.5)
    >>> examples = [(torch.randn(8, 16), torch.randint(4, (8,))) for _ in range(4)]
    >>> for _ in range(3):
    ...     losses = fit(model, lambda epoch: examples, cross_entropy, regimen=ticket)
    >>> ticket.rounds, float((model.weight == 0).float().mean())
    (3, 0.75)
    """

    share: float = 0.2
    across: bool = False
    names: tuple[str, ...] | None = None
    #: Rounds that began.
    rounds: int = field(default=0, init=False)
    _masks: WeightMasks | None = field(default=None, init=False, repr=False)
    _start: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise RequestError(f"rewinding: share is {self.share!r}; it must be above 0 and below 1, such as 0.2")

    @torch.no_grad()
    def begin(self, model: nn.Module, steps: int) -> None:
        """Remember the initial values; in a further round mask weights and return the others to them."""
        if self._masks is None:
            self._masks = WeightMasks(model, self.names)
            self._start = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        else:
            self._masks.follow(model)
            self._masks.prune(1 - (1 - self.share) ** self.rounds, across=self.across)
            model.load_state_dict(self._start)
            self._masks.hold()
        self.rounds += 1

    def optimized_by(self, optimizer: torch.optim.Optimizer) -> None:
        """What it remembers of masked weights is zero, too."""
        self._held.optimizer = optimizer

    def after_backward(self, step: int) -> None:
        """Masked weights have no gradients."""
        self._held.hold_gradients()

    def after_step(self, step: int) -> None:
        """Masked weights stay zero, whatever the optimizer did."""
        self._held.hold()

    def state(self) -> dict[str, Any]:
        """The masks, the initial values and the number of rounds."""
        return {"kept": dict(self._held.kept), "start": dict(self._start), "rounds": self.rounds}

    def resume(self, state: dict[str, Any]) -> None:
        """Continue with this round."""
        self._held.kept, self._start, self.rounds = dict(state["kept"]), dict(state["start"]), state["rounds"]

    def forms(self, model: nn.Module) -> dict[str, Form]:
        """Masks and the weights that are left; in the first round all are."""
        return self._held.forms(model)

    @property
    def _held(self) -> WeightMasks:
        if self._masks is None:
            raise RequestError("rewinding: nothing was trained yet; give the regimen to octavo.training.fit first")
        return self._masks
