"""Losses of detection, where a missed positive costs more than a false alarm."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from octavo.errors import RequestError
from octavo.sources.batches import Batch
from octavo.training.losses import LossFunction, outputs_of


def ranking_loss(scores: Tensor, positive: Tensor) -> Tensor:
    """How far positives are below the hardest negative: the mean over positives of ``min(0, s - max_neg s)^2``.

    It is a squared-hinge surrogate of one minus the AUC that looks only at the hardest negative of a batch. Its
    gradient lifts the positives below that one, and lowers that negative.

    Parameters
    ----------
    scores
        (examples,), such as logits.
    positive
        (examples,), true or 1 for positives.

    Returns
    -------
    Tensor
        A scalar; zero, still differentiable, if a batch lacks positives or negatives.

    Source: Class-dependent Compression of Deep Neural Networks (Entezari and Saukh, 2020, arXiv 1909.10364).

    Examples
    --------
    >>> float(ranking_loss(torch.tensor([2.0, 0.0, 1.0, -1.0]), torch.tensor([1, 1, 0, 0])))
    0.5
    """
    chosen = positive.bool()
    if bool(chosen.all()) or not bool(chosen.any()):
        return scores.sum() * 0.0
    return (scores[chosen] - scores[~chosen].max()).clamp(max=0.0).square().mean()


def few_misses(weight: float = 1.0, ranking: float = 0.0) -> LossFunction:
    """The loss of a detector that is to miss few positives: weighted cross entropy, plus the ranking of positives.

    ``BCE(weight * positives) + ranking * ranking_loss`` of batches ``(inputs, labels)``, for modules that return one
    logit per example. The ranking is that of probabilities, whose differences are bounded. Scores that shrink also
    bring positives near the hardest negative, so a large ``ranking`` leaves none above a threshold of one half.

    Parameters
    ----------
    weight
        How many times an error on a positive counts.
    ranking
        Weight of :func:`ranking_loss`.

    Raises
    ------
    RequestError
        If a weight is negative or not finite.
    """
    if not (0 < weight < torch.inf and 0 <= ranking < torch.inf):
        raise RequestError(
            f"few misses: weight is {weight!r} and ranking {ranking!r}; give a weight above 0 and a ranking from 0"
        )

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        inputs, labels = batch
        scores = outputs_of(module, inputs).flatten()
        value = functional.binary_cross_entropy_with_logits(
            scores, labels.float(), pos_weight=torch.tensor(weight, device=scores.device)
        )
        return value + ranking * ranking_loss(scores.sigmoid(), labels) if ranking else value

    return loss
