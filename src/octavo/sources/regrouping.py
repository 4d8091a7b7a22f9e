"""Sequences of similar length in one batch, so that few positions are padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from octavo.sources.batches import Batch, Whole, mask_of, tokens_alone

#: Positions in a batch: enough for fast products, few enough for the caches.
_POSITIONS = 1 << 10


def regrouped(batches: Sequence[Batch]) -> list[Batch]:
    """Put the same sequences in other batches, by their length in tokens; other data is returned as it is.

    Parameters
    ----------
    batches
        Independent rows. They are regrouped if all hold tokens and masks of one shape alone, and padding on the right.
    """
    if not all(isinstance(batch, Mapping) and _fits(batch) and set(batch) == set(batches[0]) for batch in batches):
        return list(batches)
    masks = [batch["attention_mask"].bool() for batch in batches]
    if all(bool(mask.all()) for mask in masks):
        return list(batches)
    lengths = [mask.sum(1) for mask in masks]
    fillers = _fillers(batches)
    rows = [(int(length), batch, row) for batch, found in zip(batches, lengths, strict=True)
            for row, length in enumerate(found.tolist())]  # fmt: skip
    rows.sort(key=lambda entry: entry[0])
    groups: list[list[tuple[int, Batch, int]]] = []
    for entry in rows:
        if not groups or (len(groups[-1]) + 1) * entry[0] > _POSITIONS:
            groups.append([])
        groups[-1].append(entry)
    return [_joined(group, fillers) for group in groups]


def _fits(batch: Batch) -> bool:
    """Whether a batch holds tokens and masks of one shape, and padding on the right alone."""
    mask = mask_of(batch)
    if isinstance(batch, Whole) or mask is None or tokens_alone(batch) is None or not mask.shape[1]:
        return False
    right = torch.arange(mask.shape[1], device=mask.device) < mask.long().sum(1, keepdim=True)
    return all(part.shape == mask.shape for part in batch.values()) and bool((mask.bool() == right).all())


def _fillers(batches: Sequence[Batch]) -> dict[str, int]:
    """What every part of a batch holds at padding."""
    found: dict[str, int] = {}
    for batch in batches:
        mask = mask_of(batch)
        assert mask is not None
        for name, part in batch.items():
            if name not in found and bool((mask == 0).any()):
                found[name] = int(part[mask == 0][0])
    return found


def _joined(group: Sequence[tuple[int, Batch, int]], fillers: Mapping[str, int]) -> dict[str, Tensor]:
    """Rows as one batch, cut off or filled up to the length of the longest."""
    width, first = group[-1][0], group[0][1]

    def row(name: str, batch: Batch, place: int) -> Tensor:
        values = batch[name][place, :width]
        return pad(values, (0, width - len(values)), value=fillers[name])

    return {name: torch.stack([row(name, batch, place) for _, batch, place in group]) for name in first}
