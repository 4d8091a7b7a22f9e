"""The cut that a request names among its methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from octavo.cuts.base import CUTS, Cut
from octavo.errors import RequestError
from octavo.methods import Method
from octavo.methods.spelling import made_of


def split_cut(words: Sequence[str | Method | Cut[Any]]) -> tuple[list[str | Method], Cut[Any] | None]:
    """The methods among ``words``, and the cut if one of them is a cut, with knobs or without.

    Raises
    ------
    RequestError
        If there are two cuts, or a knob of one cannot be set.

    Examples
    --------
    >>> split_cut(["modegpt:ridge=0.001", "entropy"])
    (['entropy'], MoDeGPT(types=('mlp', 'query-key', 'value-output'), ridge=0.001, temperature=0.06))
    """
    rest: list[str | Method] = []
    cuts: list[Cut[Any]] = []
    for word in words:
        if isinstance(word, Cut):
            cuts.append(word)
        elif isinstance(word, str) and (name := word.partition(":")[0]) in CUTS:
            cuts.append(made_of(word, CUTS.get(name)))
        else:
            rest.append(word)
    if len(cuts) > 1:
        raise RequestError(f"methods: {cuts[0].name} and {cuts[1].name} are both cuts; name one of them")
    return rest, cuts[0] if cuts else None
