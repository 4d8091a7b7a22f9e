"""A standard click-through model with its loss and metric, for recipes of recommenders."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from octavo.calibration.objective import KL
from octavo.errors import MissingExtraError
from octavo.recipes import data
from octavo.recipes.base import Trial
from octavo.recipes.models import shuffled, trained
from octavo.training import fit
from octavo.training.losses import outputs_of


class CTR(nn.Module):
    """DeepFM (Guo et al., 2017) without weights of single fields: inner products of all pairs, plus a perceptron.

    ``tables`` holds a module per field that returns rows of one width; ``mlp`` takes them concatenated.

    Parameters
    ----------
    sizes
        Values of every field.
    width
        Elements of an embedding.
    hidden
        Outputs of the hidden layers.
    """

    def __init__(self, sizes: Sequence[int], width: int = 16, hidden: Sequence[int] = (256, 128)) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, width) for size in sizes)
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.05)  # type: ignore[arg-type]
        layers: list[nn.Module] = []
        inputs = len(sizes) * width
        for outputs in hidden:
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
            inputs = outputs
        self.mlp = nn.Sequential(*layers, nn.Linear(inputs, 1))

    def forward(self, fields: Tensor) -> Tensor:
        """Fields (N, F) of indices to logits (N,)."""
        rows = torch.stack([table(fields[:, k]) for k, table in enumerate(self.tables)], 1)
        # (sum of rows)^2 - sum of rows^2 is twice the sum of the inner products of all pairs.
        pairs = (rows.sum(1).square() - rows.square().sum(1)).sum(1) / 2
        return self.mlp(rows.flatten(1))[:, 0] + pairs


def click_loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Binary cross-entropy of a batch ``(fields, labels)``."""
    fields, labels = batch
    return functional.binary_cross_entropy_with_logits(outputs_of(module, fields), labels)


class Clicks(KL):
    """``KL(source || compressed)`` of whether there is a click, for models that return its logit."""

    def outputs(self, module: nn.Module, batch: Tensor) -> Tensor:  # noqa: D102
        logits = outputs_of(module, batch)
        return torch.stack([logits, torch.zeros_like(logits)], 1).log_softmax(1)


@torch.inference_mode()
def auc(module: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    """Area under the ROC curve of examples ``(fields, labels)``, in percent."""
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError as error:
        raise MissingExtraError("the AUC needs scikit-learn: pip install 'octavo[recipes]'") from error
    scores = torch.cat([outputs_of(module.eval(), fields) for fields in part[0].split(4096)])
    return 100 * float(roc_auc_score(part[1].numpy(), scores.numpy()))


def clicks_model(
    trial: Trial, seed: int, *, epochs: int = 3, lr: float = 3e-3, width: int = 16, hidden: Sequence[int] = (256, 128)
) -> CTR:
    """A :class:`CTR` trained on :func:`octavo.recipes.data.clicks`."""
    found = data.clicks(trial)

    def make() -> nn.Module:
        torch.manual_seed(seed)
        return CTR(found.sizes, width, hidden)

    def train(model: nn.Module) -> None:
        fit(model, shuffled(*found.train, size=512, seed=seed), click_loss, epochs=epochs, lr=lr, seed=seed)

    layers = "-".join(map(str, hidden))
    model = trained(trial, f"ctr-w{width}-h{layers}-e{epochs}-lr{lr:g}-s{seed}", make, train)
    assert isinstance(model, CTR)
    return model
