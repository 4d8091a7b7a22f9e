"""Which films a user will like: implicit feedback, a graph network on it with its loss, and ranking metrics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from octavo.recipes.frame.data import Parts
from octavo.recipes.frame.nets import Batches
from octavo.recipes.testbeds.ctr import clicks

if TYPE_CHECKING:
    from octavo.recipes.frame.lab import Lab

#: How long the lists are that users see.
TOP = 20


@dataclass(frozen=True)
class Likes(Parts[Tensor]):
    """Pairs of users and films that they like, (N, 2) int64, in three parts.

    Parameters
    ----------
    users, films
        How many there are.
    """

    users: int = 0
    films: int = 0


def likes(lab: Lab, seed: int) -> Likes:
    """The ratings of 4 and 5 of MovieLens-100k, split 80/10/10 at random; in quick runs planted preferences."""
    found = clicks(lab, shuffle=seed)
    parts = [fields[labels == 1][:, :2] for fields, labels in (found.train, found.development, found.test)]
    return Likes(parts[0], parts[1], parts[2], found.digest, found.sizes[0], found.sizes[1])


class LightGCN(nn.Module):
    """Tables of users and films, averaged over the graph of likes (He et al., 2020, arXiv 2002.02126).

    Layer ``k + 1`` of a user is ``sum_i E_k[i] / sqrt(d_u d_i)`` over the films of the training data, and that of a
    film likewise. ``E_0`` is trained. The mean of all layers is what gives the scores.

    Parameters
    ----------
    found
        The data, of which the training part makes the graph.
    width
        Elements of a row.
    layers
        How often neighbours are averaged.
    """

    def __init__(self, found: Likes, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.users, self.films = nn.Embedding(found.users, width), nn.Embedding(found.films, width)
        for table in (self.users, self.films):
            nn.init.normal_(table.weight, std=0.1)
        graph = torch.zeros(found.users, found.films)
        graph[found.train[:, 0], found.train[:, 1]] = 1.0
        graph /= (graph.sum(1, keepdim=True) * graph.sum(0)).clamp_min(1.0).sqrt()
        self.register_buffer("graph", graph, persistent=False)
        self.layers = layers

    def forward(self) -> tuple[Tensor, Tensor]:
        """The averaged tables of users and films."""
        graph = self.get_buffer("graph")
        users, films = [self.users.weight], [self.films.weight]
        for _ in range(self.layers):
            users, films = [*users, graph @ films[-1]], [*films, graph.t() @ users[-1]]
        return torch.stack(users).mean(0), torch.stack(films).mean(0)


def bpr(module: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Bayesian personalized ranking: ``-log sigmoid(s(user, liked) - s(user, other))``, averaged over a batch."""
    users, films = module()
    who, liked, other = batch
    return -functional.logsigmoid((users[who] * (films[liked] - films[other])).sum(1)).mean()


def triples(found: Likes, *, size: int, seed: int) -> Batches:
    """Shuffled likes, each with a film drawn at random."""

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        draws = torch.Generator().manual_seed(1000 * seed + epoch)
        order = torch.randperm(len(found.train), generator=draws)
        other = torch.randint(found.films, (len(order),), generator=draws)
        for which, films in zip(order.split(size), other.split(size), strict=True):
            if len(which) == size:
                yield found.train[which, 0], found.train[which, 1], films

    return batches


class Popular(nn.Module):
    """A reference that recommends to everybody what most like."""

    def __init__(self, found: Likes) -> None:
        super().__init__()
        self.counts = found.train[:, 1].bincount(minlength=found.films).float()
        self.count = found.users

    def forward(self) -> tuple[Tensor, Tensor]:
        """Tables whose product is how many like each film."""
        return torch.ones(self.count, 1), self.counts[:, None]


@torch.inference_mode()
def recall(module: nn.Module, found: Likes, part: Tensor) -> tuple[float, float]:
    """Recall and NDCG at :data:`TOP` in percent, averaged over users who like something in this part.

    Films of the training data are not recommended again. NDCG divides the gains ``1 / log2(1 + place)`` by their
    largest possible sum.
    """
    users, films = module.eval()()
    scores = users @ films.t()
    scores[found.train[:, 0], found.train[:, 1]] = -torch.inf
    truth = torch.zeros(scores.shape, dtype=torch.bool)
    truth[part[:, 0], part[:, 1]] = True
    truth[found.train[:, 0], found.train[:, 1]] = False
    asked = truth.any(1)
    hits = truth[asked].gather(1, scores[asked].topk(TOP).indices).double()
    wanted = truth[asked].sum(1)
    gains = 1 / torch.arange(2, TOP + 2).double().log2()
    best = gains.cumsum(0)[wanted.clamp(max=TOP) - 1]
    return 100 * float((hits.sum(1) / wanted).mean()), 100 * float(((hits * gains).sum(1) / best).mean())
