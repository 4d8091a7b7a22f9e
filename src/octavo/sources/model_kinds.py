"""Kinds of models: whether the input is tokens, and whether there is an encoder and a decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def is_paired(module: nn.Module, batch: Any = None) -> bool:
    """Whether a module has an encoder and a decoder, so that its outputs belong to the decoder."""
    config = getattr(module, "config", None)
    named = isinstance(batch, Mapping) and any(str(key).startswith("decoder_") for key in batch)
    return named or bool(getattr(config, "is_encoder_decoder", False))


def takes_tokens(module: nn.Module | None) -> bool:
    """Whether the first input of a model is tokens, which is the default if the module does not say."""
    main = getattr(module, "main_input_name", "input_ids")
    return main == "input_ids"
