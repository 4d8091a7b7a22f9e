"""Which units stay: those with the highest scores, at every place or of all places."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from octavo.errors import RequestError

#: Kernels and blocks of quantized types want widths that are multiples of it; narrow places keep any number.
MULTIPLE, _WIDE = 32, 512


def rounded(share: float, count: int) -> float:
    """The share closest to one at which a multiple of 32 of ``count`` units stays, if there are 512 units or more.

    Examples
    --------
    >>> round(rounded(0.3, 1536) * 1536), rounded(0.3, 100)
    (448, 0.3)
    """
    if not share or count < _WIDE:
        return share
    return max(0.0, 1 - MULTIPLE * max(1, round((1 - share) * count / MULTIPLE)) / count)


def best(scores: Mapping[str, Tensor], shares: float | Mapping[str, float]) -> dict[str, Tensor]:
    """The units with the highest scores, at every place all but the share that it gives up.

    One unit stays at least. Of equal scores the first stays, on every machine.

    Parameters
    ----------
    scores
        (count,) by the units' name, as :meth:`octavo.cuts.Cut.scores` gives them.
    shares
        From 0 to below 1: one for all, or one for each name.

    Returns
    -------
    dict
        (count,) bools by the units' name, True for what stays.

    Raises
    ------
    RequestError
        If a share is missing or out of range, or a score is not finite.

    Examples
    --------
    >>> best({"mlp": torch.tensor([0.1, 3.0, 2.0, 0.5])}, 0.5)["mlp"].tolist()
    [False, True, True, False]
    """
    kept = {}
    for name, values in scores.items():
        share = shares.get(name) if isinstance(shares, Mapping) else shares
        if share is None or not 0 <= share < 1:
            raise RequestError(f"{name!r}: the share of units to remove is {share!r}; it must be from 0 to below 1")
        if not bool(torch.isfinite(values).all()):
            raise RequestError(f"{name!r}: a score is not finite; check the model and the data")
        count = max(1, round((1 - share) * len(values)))
        first = values.sort(descending=True, stable=True).indices[:count]
        kept[name] = torch.zeros(len(values), dtype=torch.bool, device=values.device).index_fill(0, first, True)
    return kept


def best_across(scores: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """All but a share of the units, those with the highest scores of all places; one stays at every place.

    Scores of all places must be comparable. Of equal scores the first stays.

    Parameters
    ----------
    scores
        (count,) by the units' name.
    share
        Share of all units that goes, from 0 to below 1.

    Returns
    -------
    dict
        (count,) bools by the units' name, True for what stays.

    Raises
    ------
    RequestError
        If there are no scores, the share is out of range, a score is not finite, or every place would lose its last
        unit.

    Examples
    --------
    >>> kept = best_across({"a": torch.tensor([0.1, 0.2, 0.3]), "b": torch.tensor([4.0, 5.0, 0.25])}, 0.5)
    >>> {name: mask.tolist() for name, mask in kept.items()}
    {'a': [False, False, True], 'b': [True, True, False]}
    """
    if not 0 <= share < 1:
        raise RequestError(f"the share of units to remove is {share!r}; it must be from 0 to below 1")
    if not scores:
        raise RequestError("units: there are no scores to choose by; give those of at least one place")
    values = torch.cat([part.double() for part in scores.values()])
    if not bool(torch.isfinite(values).all()):
        raise RequestError("units: a score is not finite; check the model and the data")
    # The best of every place comes first of all.
    first = torch.cat([torch.arange(len(part), device=part.device) == part.argmax() for part in scores.values()])
    stays = len(values) - round(share * len(values))
    if stays < len(scores):
        raise RequestError(f"the share {share!r} leaves {stays} units for {len(scores)} places; remove fewer")
    ranked = values.masked_fill(first, torch.inf).sort(descending=True, stable=True).indices[:stays]
    kept = torch.zeros_like(first).index_fill(0, ranked, True)
    return dict(zip(scores, kept.split([len(part) for part in scores.values()]), strict=True))
