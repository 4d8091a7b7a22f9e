"""Batches for training: in pieces of some examples, in random order."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from octavo.sources.batches import Batch, Whole, select, sequences_in


def pieces(batch: Batch, size: int) -> Iterator[Batch]:
    """A batch in parts of about the same size, if it can be divided."""
    if isinstance(batch, Whole):
        yield batch
        return
    for part in torch.arange(sequences_in(batch)).chunk(max(1, round(sequences_in(batch) / size))):
        yield select(batch, slice(int(part[0]), int(part[-1]) + 1))


def repeated(batches: int, steps: int, seed: int) -> Iterator[int]:
    """Numbers of batches for so many steps, in a new random order each epoch."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        order = order or torch.randperm(batches, generator=generator).tolist()
        yield order.pop()
