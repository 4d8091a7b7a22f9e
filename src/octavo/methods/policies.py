"""Structural choices learned from rewards: REINFORCE (Williams, 1992) with a running baseline, for any policy.

A policy is anything that draws choices and knows their probability: which rows of a matrix stay, which layers of a net
go, which of several settings a site gets. It needs a reward and no derivative of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, TypeVar

import torch
from torch import Tensor

from octavo.errors import RequestError

Choice = TypeVar("Choice")


class Credit(StrEnum):
    """Which rewards a choice answers for.

    ``OWN``: that of its own step, which is enough if choices do not affect later steps. ``TO_GO``: its own and all
    later ones. ``SHARED``: as ``TO_GO``, but all rollouts of an update get the mean of their advantages, so that good
    ones are not told from bad ones.
    """

    OWN = "own"
    TO_GO = "to-go"
    SHARED = "shared"


@dataclass(frozen=True)
class Rollout(Generic[Choice]):
    """Choices drawn from a policy, one a step.

    Parameters
    ----------
    choice
        What was drawn.
    logs
        (steps,) logarithms of the probability of each choice, with their graph.
    rewards
        (steps,); a reward that is known only at the end stands in the last step, after zeros.
    """

    choice: Choice
    logs: Tensor
    rewards: Tensor

    @property
    def total(self) -> float:
        """The sum of all rewards."""
        return float(self.rewards.sum())


@dataclass
class Reinforce:
    """Policy gradients: after every update choices whose reward was above the baseline are more probable.

    The loss is ``-sum_t A_t log p(choice_t)``, averaged over the rollouts of an update. The advantage ``A_t`` is the
    reward that step ``t`` answers for, less a running mean of it over earlier updates. The expected gradient is the
    same with any such baseline, and its variance is smaller. The first update has no earlier one: it takes the mean of
    its own rollouts, so a single rollout only sets the baseline.

    Parameters
    ----------
    optimizer
        Of the policy's parameters.
    credit
        Which rewards a choice answers for.
    memory
        The share of the baseline that stays at an update, from 0 to below 1; None for no baseline.

    Examples
    --------
    Two arms, of which the second pays more. No reward is negative, so the baseline tells good from bad:

    >>> torch.manual_seed(0)
    <torch._C.Generator object at ...>
    >>> logits = torch.zeros(2, requires_grad=True)
    >>> learner = Reinforce(torch.optim.SGD([logits], lr=0.5))
    >>> for _ in range(100):
    ...     drawn = torch.multinomial(logits.softmax(0), 4, replacement=True).tolist()
    ...     learner.update([Rollout(a, logits.log_softmax(0)[[a]], torch.tensor([5.0 + a])) for a in drawn])
    >>> bool(logits.softmax(0)[1] > 0.9)
    True
    """

    optimizer: torch.optim.Optimizer
    credit: Credit = Credit.TO_GO
    memory: float | None = 0.9
    baseline: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.memory is not None and not 0 <= self.memory < 1:
            raise RequestError(f"memory: {self.memory!r} of a running mean; give a number from 0 to below 1, or None")

    def update(self, rollouts: Sequence[Rollout[Choice]], penalty: Tensor | None = None) -> None:
        """Take one step of the optimizer, and move the baseline.

        Parameters
        ----------
        penalty
            A scalar that is added to the loss, such as a price on the policy's entropy.

        Raises
        ------
        RequestError
            If there are no rollouts, they have different numbers of steps, or a reward is not finite.
        """
        _check(rollouts)
        returns = torch.stack([self._answered(rollout.rewards.detach()) for rollout in rollouts])
        mean = returns.mean(0)
        advantages = returns
        if self.memory is not None:
            before = mean if self.baseline is None else self.baseline
            advantages = returns - before
            self.baseline = self.memory * before + (1 - self.memory) * mean
        if self.credit is Credit.SHARED:
            advantages = advantages.mean(0, keepdim=True)
        loss = -(advantages * torch.stack([rollout.logs for rollout in rollouts])).sum(1).mean()
        self.optimizer.zero_grad()
        (loss if penalty is None else loss + penalty).backward()
        self.optimizer.step()

    def _answered(self, rewards: Tensor) -> Tensor:
        return rewards if self.credit is Credit.OWN else rewards.flip(0).cumsum(0).flip(0)


def _check(rollouts: Sequence[Rollout[Choice]]) -> None:
    if not rollouts:
        raise RequestError("rollouts: an update has none; draw at least one")
    steps = len(rollouts[0].logs)
    for number, rollout in enumerate(rollouts):
        if tuple(rollout.logs.shape) != (steps,) or tuple(rollout.rewards.shape) != (steps,):
            raise RequestError(
                f"rollouts: number {number} has logarithms of shape {tuple(rollout.logs.shape)} and rewards of shape "
                f"{tuple(rollout.rewards.shape)}; all must be ({steps},), as in the first"
            )
        if not bool(torch.isfinite(rollout.rewards).all()):
            raise RequestError(f"rollouts: a reward of number {number} is not finite; give every outcome a number")
