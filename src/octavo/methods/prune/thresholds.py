"""One threshold for the scores of all places, with a floor for each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from octavo.errors import RequestError


def above(scores: Mapping[str, Tensor], share: float, floor: float | int = 0.1) -> dict[str, Tensor]:
    """Keep the best of all units by one threshold; every place keeps a floor of its best, and one at least.

    Parameters
    ----------
    scores
        (units,) by the name of their place; higher is better, and scores of all places are comparable.
    share
        Of all units, those to be removed. More stay where the floor holds them.
    floor
        Units that every place keeps at least: a share of them below 1, or a number.

    Returns
    -------
    dict
        (units,) bools by name, True for what stays.

    Raises
    ------
    RequestError
        If the share or the floor is out of range, or a score is not finite.

    Examples
    --------
    >>> kept = above({"a": torch.tensor([3.0, 0.1, 2.0]), "b": torch.tensor([0.2, 0.3])}, 0.6, 0.5)
    >>> {name: mask.tolist() for name, mask in kept.items()}
    {'a': [True, False, True], 'b': [False, True]}
    """
    if not 0 <= share < 1 or floor < 0:
        raise RequestError(
            f"threshold: share is {share!r} and floor {floor!r}; they must be from 0 to below 1, and at least 0"
        )
    every = torch.cat([score.detach().flatten() for score in scores.values()])
    if not bool(every.isfinite().all()):
        raise RequestError("threshold: a score is not finite; check the model and the data")
    threshold = every.sort().values[int(share * len(every))]
    kept = {}
    for name, score in scores.items():
        least = round(floor * len(score)) if floor < 1 else int(floor)
        first = score.detach().sort(descending=True, stable=True).indices[: max(1, least)]
        kept[name] = (score.detach() >= threshold).index_fill(0, first, True)
    return kept
