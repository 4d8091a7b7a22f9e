"""Finding a rare class: images of it among many others, a small detector, and what it misses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from octavo.errors import MissingExtraError
from octavo.recipes.frame.data import Parts, fashion
from octavo.training.losses import outputs_of

if TYPE_CHECKING:
    from octavo.recipes.frame.lab import Lab

#: Inputs (N, elements) and whether each is of the class to find, 0 or 1.
Part = tuple[Tensor, Tensor]
#: The class to find, pullovers, and its share of the training images.
POSITIVE, RARE = 2, 0.02
#: The false alarms at which detectors are compared.
ALARMS = 0.1


def pullovers(lab: Lab, seed: int) -> Parts[Part]:
    """Images of Fashion-MNIST as rows, and whether each is a pullover; of those for training 2% are, by the seed."""
    split = fashion(lab)
    parts = [(x.flatten(1), (y == POSITIVE).float()) for x, y in (split.train, split.development, split.test)]
    x, y = parts[0]
    places, others = y.nonzero()[:, 0], (y == 0).nonzero()[:, 0]
    count = max(8, round(RARE / (1 - RARE) * len(others)))
    chosen = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))[:count]]
    which = torch.cat([others, chosen])
    return Parts((x[which], y[which]), parts[1], parts[2], split.digest)


def perceptron(inputs: int, seed: int) -> nn.Module:
    """LeNet-300-100 with one logit."""
    torch.manual_seed(seed)
    first, second, last = nn.Linear(inputs, 300), nn.Linear(300, 100), nn.Linear(100, 1)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last, nn.Flatten(0))


class MeanDistance(nn.Module):
    """A reference that knows only the mean of the positives: the nearer, the likelier."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.mean = part[0][part[1].bool()].mean(0)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N,) of inputs (N, elements)."""
        return -(x - self.mean).square().sum(1)


@dataclass(frozen=True)
class Detected:
    """What a detector does on some examples.

    Parameters
    ----------
    missed
        Share of positives whose logit is not above zero, in percent.
    at_equal
        The same at the threshold that has :data:`ALARMS` false alarms.
    area
        Area under the ROC curve, in percent.
    """

    missed: float
    at_equal: float
    area: float


@torch.inference_mode()
def detected(model: nn.Module, part: Part) -> Detected:
    """What a detector does on examples."""
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError as error:
        raise MissingExtraError("the AUC needs scikit-learn: pip install 'octavo[recipes]'") from error
    scores, positive = outputs_of(model.eval(), part[0]), part[1].bool()
    threshold = float(scores[~positive].double().quantile(1 - ALARMS))
    missed, at_equal = (100 * float((scores[positive] <= value).double().mean()) for value in (0.0, threshold))
    return Detected(missed, at_equal, 100 * float(roc_auc_score(part[1].numpy(), scores.numpy())))
