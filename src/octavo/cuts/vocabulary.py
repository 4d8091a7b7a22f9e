"""Rows of token tables as units: what is left gets new numbers, in the config too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from octavo.cuts.base import Units
from octavo.errors import RequestError

#: Config entries that are the number of a token.
SPECIAL = (
    "pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id",
    "decoder_start_token_id",
)  # fmt: skip


def new_numbers(kept: Tensor) -> Tensor:
    """The new number of every token, (tokens,); -1 for those that went. A tokenizer must follow it.

    Examples
    --------
    >>> new_numbers(torch.tensor([True, False, True])).tolist()
    [0, -1, 1]
    """
    return torch.where(kept, kept.cumsum(0) - 1, -1)


def special_tokens(config: Any) -> dict[str, int]:
    """The tokens that a config names, by its entries."""
    named = {name: getattr(config, name, None) for name in SPECIAL}
    return {name: number for name, number in named.items() if isinstance(number, int) and number >= 0}


def free_padding(model: nn.Module, tokens: Units, kept: Tensor) -> dict[str, int]:
    """Let the tables of a model forget their padding row, in place; returns its new number by their paths."""
    found = {}
    for piece in tokens.slices:
        path = piece.tensor.rpartition(".")[0]
        table = model.get_submodule(path)
        if isinstance(table, nn.Embedding) and table.padding_idx is not None:
            found[path] = int(new_numbers(kept)[table.padding_idx])
            table.padding_idx = None
    return found


def renumber_tokens(model: nn.Module, config: Any, padding: dict[str, int], kept: Tensor) -> None:
    """Let a thinner model and its config know the new numbers of tokens, in place."""
    for path, number in padding.items():
        table: Any = model.get_submodule(path)
        table.padding_idx = number
    config.vocab_size = int(kept.sum())
    for name, number in special_tokens(config).items():
        if number < len(kept):
            setattr(config, name, int(new_numbers(kept)[number]))


def check_special(config: Any, tokens: Units, kept: Tensor) -> None:
    """Refuse to remove a token that the config names.

    Raises
    ------
    RequestError
        Naming the entry.
    """
    for name, number in special_tokens(config).items():
        if number < len(kept) and not bool(kept[number]):
            raise RequestError(
                f"kept: {tokens.name!r} lacks token {number}, which is the {name} of the config; keep it"
            )
