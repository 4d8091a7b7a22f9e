"""Weighted k-means of short vectors, which several methods learn their books by."""

from __future__ import annotations

import torch
from torch import Tensor

#: Distances that are in memory at once.
_AT_ONCE = 1 << 24


def learned(vectors: Tensor, cost: Tensor, entries: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Centres (entries, width) of vectors (n, width); entries that lose all vectors take random ones.

    Parameters
    ----------
    cost
        (n, width) weights of squared errors.
    """
    book = vectors[torch.randint(len(vectors), (entries,), generator=generator)].clone()
    for _ in range(iterations):
        member = nearest(vectors, book, cost)
        mass = torch.zeros_like(book).index_add_(0, member, cost)
        book = torch.zeros_like(book).index_add_(0, member, cost * vectors) / mass.clamp_min(1e-30)
        empty = mass[:, 0] == 0
        drawn = torch.randint(len(vectors), (int(empty.sum()),), generator=generator)
        book[empty] = vectors[drawn]
    return book


def nearest(vectors: Tensor, book: Tensor, cost: Tensor) -> Tensor:
    """The entry (n,) of least weighted squared distance."""
    found, size = [], max(1, _AT_ONCE // len(book))
    for own, weight in zip(vectors.split(size), cost.split(size), strict=True):
        distance = weight @ book.square().t() - 2 * (own * weight) @ book.t()
        found.append(distance.argmin(1))
    return torch.cat(found)
