"""Click-through data, a standard model of them with its loss and metric, for studies of recommenders."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from octavo.calibration.objective import KL
from octavo.errors import MissingExtraError
from octavo.recipes.frame.data import Parts, digest, package_folder
from octavo.recipes.frame.nets import shuffled
from octavo.training import fit
from octavo.training.losses import outputs_of

if TYPE_CHECKING:
    from octavo.recipes.frame.lab import Lab

MOVIELENS = "MovieLens-100k (pip install --no-deps recbole; files.grouplens.org)"


@dataclass(frozen=True)
class ClickData(Parts[tuple[Tensor, Tensor]]):
    """Click-through data: categorical fields (N, F) int64, and labels (N,) float32 of 0 and 1.

    Parameters
    ----------
    sizes, names
        Number of values, and the name, of every field.
    """

    sizes: tuple[int, ...] = ()
    names: tuple[str, ...] = ()


def clicks(lab: Lab, shuffle: int | None = None) -> ClickData:
    """MovieLens-100k as clicks (rating 4 or more), split 80/10/10; in quick runs planted preferences.

    Fields: user, item, age by decades, gender, occupation, first genre of the film, year of its release.

    Parameters
    ----------
    shuffle
        Seed of a random split; by default the split is by time.
    """
    fields, labels, names = _planted() if lab.quick else _movielens()
    if shuffle is not None:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(shuffle))
        fields, labels = fields[order], labels[order]
    a, b = int(len(labels) * 0.8), int(len(labels) * 0.9)
    parts = [(fields[i:j], labels[i:j]) for i, j in ((0, a), (a, b), (b, len(labels)))]
    made = digest(fields.numpy().tobytes(), labels.numpy().tobytes())
    return ClickData(parts[0], parts[1], parts[2], made, tuple(int(n) + 1 for n in fields.max(0).values), names)


def _movielens() -> tuple[Tensor, Tensor, tuple[str, ...]]:
    folder = package_folder("recbole", "pip install --no-deps recbole") / "dataset_example" / "ml-100k"

    def read(kind: str) -> list[list[str]]:
        with open(folder / f"ml-100k.{kind}", encoding="utf-8", newline="") as opened:
            return list(csv.reader(opened, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]

    users, items = ({row[0]: row for row in read(kind)} for kind in ("user", "item"))
    rows = sorted(read("inter"), key=lambda row: (float(row[3]), row[0], row[1]))
    values = []
    for user, item, *_ in rows:
        _, age, gender, work, *_ = users[user]
        film = items[item]
        values.append((user, item, str(int(age) // 10), gender, work, (film[3].split() or ["none"])[0], film[2]))
    columns = [np.unique(column, return_inverse=True)[1] for column in zip(*values, strict=True)]
    names = ("user", "item", "age", "gender", "occupation", "genre", "year")
    return torch.tensor(np.stack(columns, 1)).long(), torch.tensor([float(float(row[2]) >= 4) for row in rows]), names


def _planted() -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Clicks drawn from the inner product of hidden factors of users and items."""
    generator = torch.Generator().manual_seed(0)
    users, items = torch.randn(200, 4, generator=generator), torch.randn(300, 4, generator=generator)
    fields = torch.stack([torch.randint(0, n, (6000,), generator=generator) for n in (200, 300, 5)], 1)
    logit = (users[fields[:, 0]] * items[fields[:, 1]]).sum(1) + 0.3 * fields[:, 2] - 0.6
    labels = (torch.rand(6000, generator=generator) < torch.sigmoid(1.5 * logit)).float()
    return fields, labels, ("user", "item", "context")


def crossed(found: ClickData, pairs: Sequence[tuple[int, int]]) -> ClickData:
    """The data with one more field for every pair of fields, whose values are the pairs of values that occur.

    Such fields are long, and most of their values are rare, as in the logs of large services.
    """
    parts = (found.train, found.development, found.test)
    fields, sizes, names = torch.cat([part[0] for part in parts]), list(found.sizes), list(found.names)
    for one, other in pairs:
        values, index = (fields[:, one] * found.sizes[other] + fields[:, other]).unique(return_inverse=True)
        fields = torch.cat([fields, index[:, None]], 1)
        sizes.append(len(values))
        names.append(f"{found.names[one]} and {found.names[other]}")
    split = fields.split([len(part[0]) for part in parts])
    train, development, test = ((rows, part[1]) for rows, part in zip(split, parts, strict=True))
    made = digest(found.digest.encode(), repr(pairs).encode())
    return ClickData(train, development, test, made, tuple(sizes), tuple(names))


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


class FilmMeans(nn.Module):
    """A reference that only knows how a film was rated: its mean label, with five films' worth of the mean of all."""

    def __init__(self, found: ClickData) -> None:
        super().__init__()
        films, labels = found.train[0][:, 1], found.train[1]
        counts, sums = (films.bincount(weights, minlength=found.sizes[1]) for weights in (None, labels))
        self.means = (sums + 5 * labels.mean()) / (counts + 5)

    def forward(self, fields: Tensor) -> Tensor:
        """Means (N,) of fields (N, F)."""
        return self.means[fields[:, 1]]


def click_loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Binary cross-entropy of a batch ``(fields, labels)``."""
    fields, labels = batch
    return functional.binary_cross_entropy_with_logits(outputs_of(module, fields), labels)


class ClickKL(KL):
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
    lab: Lab,
    found: ClickData,
    seed: int,
    *,
    epochs: int = 3,
    lr: float = 3e-3,
    width: int = 16,
    hidden: Sequence[int] = (256, 128),
) -> CTR:
    """A :class:`CTR` trained on :func:`clicks`, cached."""

    def make() -> nn.Module:
        torch.manual_seed(seed)
        return CTR(found.sizes, width, hidden)

    def train(model: nn.Module) -> None:
        parts = [part.to(lab.device) for part in found.train]
        fit(model.to(lab.device), shuffled(*parts, size=512, seed=seed), click_loss, epochs=epochs, lr=lr, seed=seed)

    settings: dict[str, Any] = {"width": width, "hidden": list(hidden), "epochs": epochs, "lr": lr, "seed": seed}
    model = lab.base(f"ctr-w{width}-s{seed}", make, train, data=found.digest, **settings)
    assert isinstance(model, CTR)
    return model
