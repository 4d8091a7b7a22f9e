"""Which weights are needed, and in runs: a three-layer prior, and beliefs about it by turbo variational inference.

The prior of a row of weights is ``p(s) p(rho | s) p(w | rho)``. The support ``s`` is a Markov chain of 0 and 1 along
the row, the precision is ``rho | s ~ Gamma(shape, rate)`` with one pair for each state, and ``w | rho ~ N(0, 1/rho)``.
Everything is in units in which the weights of a layer have a root mean square of 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.errors import RequestError

#: Updates of precisions and support in a turn.
_SWEEPS = 3


@dataclass(frozen=True)
class SupportPrior:
    """The prior of weights and of their support.

    Parameters
    ----------
    density
        Share of weights that are active, above 0 and below 1.
    run
        Mean number of neighbours that are active in a row; None for weights that are independent of each other.
    active, quiet
        Shape and rate of the Gamma distribution of a precision, for active weights and for the others.
    """

    density: float = 0.1
    run: float | None = 4.0
    active: tuple[float, float] = (1.0, 1.0)
    quiet: tuple[float, float] = (1.0, 0.01)

    def __post_init__(self) -> None:
        if not 0 < self.density < 1:
            raise RequestError(f"support prior: density is {self.density!r}; it must be above 0 and below 1")
        if self.run is not None and not 1 / (1 - self.density) <= self.run < math.inf:
            raise RequestError(
                f"support prior: run is {self.run!r}; independent weights of density {self.density:g} have runs of "
                f"{1 / (1 - self.density):.3g}, so give at least that, or None"
            )
        if min(*self.active, *self.quiet) <= 0 or self.quiet[0] / self.quiet[1] <= self.active[0] / self.active[1]:
            raise RequestError(
                f"support prior: active is {self.active} and quiet {self.quiet}; shapes and rates must be positive, "
                "and the mean precision (shape / rate) of quiet weights the higher one"
            )

    @property
    def leaving(self) -> float:
        """Probability that the neighbour of an active weight is not."""
        return 1 - self.density if self.run is None else 1 / self.run

    @property
    def entering(self) -> float:
        """Probability that the neighbour of a quiet weight is active; so ``density`` of all are."""
        return self.leaving * self.density / (1 - self.density)

    @property
    def odds(self) -> float:
        """Log-odds of a weight to be active, if nothing is known of its neighbours."""
        return math.log(self.density / (1 - self.density))


@dataclass(frozen=True)
class Precisions:
    """Gamma distributions of precisions.

    Parameters
    ----------
    shape, rate
        (rows, columns) each.
    """

    shape: Tensor
    rate: Tensor

    @property
    def mean(self) -> Tensor:
        """``<rho>``."""
        return self.shape / self.rate

    @property
    def log_mean(self) -> Tensor:
        """``<ln rho>``."""
        return torch.digamma(self.shape) - self.rate.log()


@dataclass(frozen=True)
class Beliefs:
    """What is known of a matrix.

    Parameters
    ----------
    precisions
        ``q(rho)``.
    support
        (rows, columns) ``q(s = 1)``.
    odds
        (rows, columns) log-odds of ``s = 1`` that neighbours suggest: the extrinsic message of the chain.
    """

    precisions: Precisions
    support: Tensor
    odds: Tensor


def precisions(squares: Tensor, support: Tensor, prior: SupportPrior) -> Precisions:
    """The best ``q(rho)`` if ``squares`` are ``<w^2>`` and ``support`` is ``q(s = 1)``."""
    (a, b), (c, d) = prior.active, prior.quiet
    return Precisions(support * a + (1 - support) * c + 0.5, support * b + (1 - support) * d + squares / 2)


def evidence(known: Precisions, prior: SupportPrior) -> Tensor:
    """Log-odds of ``s = 1`` that a weight itself suggests: ``<ln p(rho | 1)> - <ln p(rho | 0)>``."""
    (a, b), (c, d) = prior.active, prior.quiet
    constant = a * math.log(b) - math.lgamma(a) - c * math.log(d) + math.lgamma(c)
    found = constant - (b - d) * known.mean
    return found if a == c else found + (a - c) * known.log_mean


def extrinsic(own: Tensor, prior: SupportPrior) -> Tensor:
    """Log-odds of ``s = 1`` that the other weights of a row suggest, by the forward-backward algorithm.

    Parameters
    ----------
    own
        (rows, columns) log-odds that every weight itself suggests. They are not part of its own result.
    """
    if prior.run is None:
        return torch.full_like(own, prior.odds)
    # The chain is the same in both directions. So one pass reads all rows, and all rows from their ends.
    given = torch.cat([own, own.flip(1)]).t().contiguous()
    known, found = torch.full_like(given[0], prior.odds), torch.empty_like(given)
    for place, suggested in enumerate(given):
        found[place] = known
        active = (known + suggested).sigmoid_()
        known = active.mul_(1 - prior.leaving - prior.entering).add_(prior.entering).logit_()
    ahead, behind = found.t().chunk(2)
    return ahead + behind.flip(1) - prior.odds


def inferred(squares: Tensor, prior: SupportPrior, rounds: int = 3) -> Beliefs:
    """Beliefs about a matrix, by turns between its weights (mean-field updates) and the chain (messages).

    The updates have two fixed points for weights of middling size, and keep a weight active that was so once. So every
    turn begins with quiet weights.

    Parameters
    ----------
    squares
        (rows, columns) ``<w^2> = mu^2 + sigma^2``, in units of the layer's mean square.
    rounds
        Turns.
    """
    odds = torch.full_like(squares, prior.odds)
    for turn in range(rounds + 1):
        support = torch.zeros_like(squares)
        for _ in range(_SWEEPS):
            known = precisions(squares, support, prior)
            own = evidence(known, prior)
            support = (odds + own).sigmoid()
        if turn < rounds:
            odds = extrinsic(own, prior)
    return Beliefs(precisions(squares, support, prior), support, odds)
