"""Sequence vectors pooled from token states, as in ``sentence-transformers``."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.errors import RequestError

#: In the order in which the old format of a pooling module's configuration concatenates them.
MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


def modes_of(pooling: str) -> tuple[str, ...]:
    """The modes in a name such as ``cls+mean``, whose vectors are concatenated in that order.

    Raises
    ------
    RequestError
        If a mode is not known; the error names it.
    """
    modes = tuple(pooling.split("+"))
    for mode in modes:
        if mode not in MODES:
            raise RequestError(
                f"pooling: {mode!r} is not known; choose from {', '.join(MODES)}, or join several with '+'"
            )
    return modes


def pooled(states: Tensor, mask: Tensor | None, modes: tuple[str, ...], prompt: int = 0) -> Tensor:
    """Vectors of sequences, (sequences, modes x width).

    Parameters
    ----------
    states
        (sequences, tokens, width).
    mask
        (sequences, tokens), separates tokens from padding; None if there is no padding.
    prompt
        Tokens at the beginning of every sequence that are left out.
    """
    given = torch.ones(states.shape[:2], dtype=torch.long, device=states.device) if mask is None else mask
    kept = _without_prompt(given, prompt) if prompt else given
    return torch.cat([_pooled(states, kept, given, mode) for mode in modes], dim=-1)


def _pooled(states: Tensor, mask: Tensor, given: Tensor, mode: str) -> Tensor:
    rows, length = torch.arange(len(states), device=states.device), states.shape[1]
    if mode == "cls":
        return states[rows, mask.int().argmax(1)]
    if mode == "max":
        return states.masked_fill(mask[..., None] == 0, float("-inf")).amax(1)
    if mode == "lasttoken":
        # If no token is kept, the first is used, times a mask of zero.
        last = (length - 1 - mask.int().flip(1).argmax(1)) * mask.any(1)
        return (states * mask[..., None].to(states.dtype))[rows, last]
    wide = torch.float32 if states.dtype in (torch.float16, torch.bfloat16) else states.dtype
    if mode == "weightedmean":
        places = torch.arange(1, length + 1, device=states.device, dtype=wide)[None] - given.int().argmax(1)[:, None]
        weights = (mask.to(wide) * places)[..., None]
        return ((states * weights).sum(1) / weights.sum(1).clamp_min(1e-9)).to(states.dtype)
    weights = mask.to(states.dtype)[..., None]
    count = weights.sum(1, dtype=wide).clamp_min(1e-9)
    return ((states * weights).sum(1, dtype=wide) / (count if mode == "mean" else count.sqrt())).to(states.dtype)


def _without_prompt(mask: Tensor, prompt: int) -> Tensor:
    """The mask without the first tokens of every sequence, for any side of padding."""
    first = mask.int().argmax(1)[:, None]
    return mask.masked_fill(torch.arange(mask.shape[1], device=mask.device)[None] < first + prompt, 0)
