"""Which shares of each kind of units may go to reach a size: what a search over architectures starts from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from octavo.cuts.base import Units, saved
from octavo.cuts.choosing import best
from octavo.errors import RequestError


def shares_near(
    model: nn.Module, units: Sequence[Units], target: int, grid: Mapping[str, Sequence[float]], near: float = 0.05
) -> Iterator[dict[str, float]]:
    """All combinations of shares that leave about as many weights as asked for.

    Minitron trains each of them briefly, and goes on with the best.

    Parameters
    ----------
    units
        What may go.
    target
        Weights of the model that is wanted.
    grid
        Shares to try, by kind of units.
    near
        How far from the target the weights may be, as a share of it.

    Yields
    ------
    dict
        A share for each of the units' names, as :func:`octavo.cuts.best` takes it.

    Raises
    ------
    RequestError
        If a kind has no shares in the grid.
    """
    kinds = list(dict.fromkeys(part.kind for part in units))
    missing = next((kind for kind in kinds if kind not in grid), None)
    if missing is not None:
        raise RequestError(
            f"grid: has no shares of the kind {missing!r}; give some, such as {{{missing!r}: (0, 0.25)}}"
        )
    whole = sum(parameter.numel() for parameter in model.parameters())
    # Any units of a place weigh alike.
    scores: dict[str, Tensor] = {part.name: torch.arange(part.count) for part in units}
    for chosen in itertools.product(*(grid[kind] for kind in kinds)):
        by_kind = dict(zip(kinds, chosen, strict=True))
        shares = {part.name: by_kind[part.kind] for part in units}
        left = whole - saved(model, units, best(scores, shares))
        if abs(left - target) <= near * target:
            yield shares
