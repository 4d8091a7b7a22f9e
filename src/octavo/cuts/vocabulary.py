"""Rows of token tables as units: what is left gets new numbers, in the config too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from octavo.cuts.base import Units
from octavo.errors import RequestError

#: Entries of configs that name tokens without which a model cannot be used: a number, or a list of numbers.
SPECIAL = (
    "pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id",
    "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "forced_decoder_ids", "force_words_ids",
    "no_timestamps_token_id", "prev_sot_token_id",
)  # fmt: skip
#: Entries that forbid tokens or make them likelier: those with a token that went mean nothing more.
BIASES = ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias")
#: Entries that look tokens up by name, such as the languages of Whisper.
NAMED = ("lang_to_id", "task_to_id")


def new_numbers(kept: Tensor) -> Tensor:
    """The new number of every token, (tokens,); -1 for those that went. A tokenizer must follow it.

    Examples
    --------
    >>> new_numbers(torch.tensor([True, False, True])).tolist()
    [0, -1, 1]
    """
    return torch.where(kept, kept.cumsum(0) - 1, -1)


def special_tokens(config: Any) -> dict[str, tuple[int, ...]]:
    """The tokens that a config, or a config of generation, names: by its entries.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> special_tokens(SimpleNamespace(eos_token_id=[2, 5], pad_token_id=0, bos_token_id=None))
    {'pad_token_id': (0,), 'eos_token_id': (2, 5)}
    """
    named = {name: tuple(_tokens(name, getattr(config, name, None))) for name in SPECIAL}
    return {name: numbers for name, numbers in named.items() if numbers}


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
    """Let a thinner model, its config and its config of generation know the new numbers of tokens, in place."""
    for path, number in padding.items():
        table: Any = model.get_submodule(path)
        table.padding_idx = number
    config.vocab_size = int(kept.sum())
    numbers = new_numbers(kept).tolist()

    def renumbered(token: int) -> int:
        return int(numbers[token]) if token < len(numbers) else token

    def stays(name: str, value: Any) -> bool:
        return all(renumbered(token) >= 0 for token in _tokens(name, value))

    for each in _configs(model, config):
        for name in SPECIAL:
            if hasattr(each, name):
                setattr(each, name, _changed(name, getattr(each, name), renumbered))
        for name in (*BIASES, *NAMED):
            value = getattr(each, name, None)
            if isinstance(value, dict):
                left: Any = {key: item for key, item in value.items() if stays(name, {key: item})}
            elif isinstance(value, list | tuple):
                left = [item for item in value if stays(name, [item])]
            else:
                continue
            # Generation takes no empty list of forbidden words.
            emptied = name in BIASES and bool(value) and not left
            setattr(each, name, None if emptied else _changed(name, left, renumbered))


def check_special(model: nn.Module, config: Any, tokens: Units, kept: Tensor) -> None:
    """Refuse to remove a token that the config of a model, or its config of generation, names.

    Raises
    ------
    RequestError
        Naming the entry.
    """
    for each in _configs(model, config):
        for name, numbers in special_tokens(each).items():
            for number in numbers:
                if number < len(kept) and not bool(kept[number]):
                    raise RequestError(
                        f"kept: {tokens.name!r} lacks token {number}, which is the {name} of the config; keep it"
                    )


def _configs(model: nn.Module, config: Any) -> list[Any]:
    """A config, and those of the generation of all models that have it."""
    parts: list[Any] = [part for part in model.modules() if getattr(part, "config", None) is config]
    found = [getattr(part, "generation_config", None) for part in parts]
    return [config, *{id(each): each for each in found if each is not None}.values()]


def _tokens(name: str, value: Any) -> list[int]:
    """The tokens in an entry of a config."""
    found: list[int] = []

    def seen(token: int) -> int:
        found.append(token)
        return token

    _changed(name, value, seen)
    return found


def _changed(name: str, value: Any, change: Callable[[int], int]) -> Any:
    """An entry of a config with other tokens in it; what is no token stays, such as negative numbers."""
    if name == "forced_decoder_ids" and value:
        return [[place, _changed("", token, change)] for place, token in value]
    if name == "sequence_bias" and isinstance(value, dict):
        return {tuple(_changed("", [*words], change)): bias for words, bias in value.items()}
    if name == "sequence_bias" and value:
        return [[_changed("", words, change), bias] for words, bias in value]
    if isinstance(value, dict):
        return {key: _changed("", item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_changed("", item, change) for item in value]
    return change(value) if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else value
