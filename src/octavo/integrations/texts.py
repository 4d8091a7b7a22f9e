"""Texts as batches of tokens, for models of ``transformers``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo.data.texts import MINIMUM_TEXTS
from octavo.errors import RequestError
from octavo.integrations.transformers import require_transformers

#: Longer texts are cut: calibration gains little from them and costs the square of their length.
MAX_TOKENS = 128
_SHORTEST_WINDOW = 16


def text_batches(folder: Path, texts: Sequence[str], *, size: int = 32) -> list[dict[str, Tensor]]:
    """Tokenised, padded batches of texts. Neighbours in length share a batch, so that little is padding."""
    tokenizer = _tokenizer(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    ordered = sorted(texts, key=len)
    return [
        dict(
            tokenizer(
                ordered[at : at + size], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
            )
        )
        for at in range(0, len(ordered), size)
    ]


def is_causal(module: nn.Module | None) -> bool:
    """Whether a model predicts the next token."""
    return type(module).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def context_of(module: nn.Module) -> int:
    """Most tokens that a model takes at once; a number no text reaches where it does not say."""
    config: Any = getattr(module, "config", None)
    config = config.get_text_config() if config is not None else None
    longest = int(getattr(config, "max_position_embeddings", None) or 0)
    return longest if longest > 0 else 2**31


def window_batches(
    folder: Path, texts: Sequence[str], length: int, *, limit: int | None = None, size: int = 4
) -> list[dict[str, Tensor]]:
    """Batches of windows of equal length, without padding, cut from all texts one after another.

    Every position then predicts from text, whatever the batch size, and none is spent on padding.

    Parameters
    ----------
    length
        Tokens of a window; fewer if the texts would not fill ten of them.
    limit
        Tokens at most; windows are then spread evenly over the texts.
    """
    tokenizer = _tokenizer(folder)
    tokens = tokenizer("\n".join(texts), add_special_tokens=False)["input_ids"]
    # Models that were trained with a first token go astray without it.
    first = tokenizer("", add_special_tokens=True)["input_ids"][:1] if tokenizer.bos_token_id is not None else []
    first = [token for token in first if token == tokenizer.bos_token_id]
    length = min(length, max(_SHORTEST_WINDOW, len(tokens) // (2 * MINIMUM_TEXTS)))
    stride = length - len(first)
    starts = range(0, len(tokens) - stride + 1, stride)
    if len(starts) < MINIMUM_TEXTS:
        raise RequestError(
            f"the texts hold {len(tokens)} tokens, {len(starts)} windows of {length}; give at least "
            f"{MINIMUM_TEXTS * length} tokens (a language model is served well by 32,000)"
        )
    windows = [first + tokens[start : start + stride] for start in starts]
    if limit is not None and len(windows) > max(limit // length, MINIMUM_TEXTS):
        count = max(limit // length, MINIMUM_TEXTS)
        windows = [windows[index * len(windows) // count] for index in range(count)]
    rows = torch.tensor(windows)
    return [{"input_ids": rows[at : at + size]} for at in range(0, len(rows), size)]


def _tokenizer(folder: Path) -> Any:
    try:
        return require_transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise RequestError(f"{folder}: no tokenizer can be loaded from it, and calibration is text: {error}") from error


def check_tokens(module: Any, batches: Sequence[Any]) -> None:
    """Refuse tokens that the model does not have, and sequences longer than it takes.

    Raises
    ------
    RequestError
        Naming the token or the length.
    """
    words = getattr(module.get_input_embeddings(), "num_embeddings", None)
    context = context_of(module)
    name = type(module).__name__
    for batch in batches:
        tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if not isinstance(tokens, Tensor) or not tokens.numel():
            continue
        least, most = int(tokens.min()), int(tokens.max())
        if words is not None and (least < 0 or most >= words):
            raise RequestError(
                f"the data hold token {least if least < 0 else most}, and {name} knows tokens 0 to {words - 1}: the "
                "tokenizer does not belong to this model; use the one that the model was published with"
            )
        if tokens.shape[-1] > context:
            raise RequestError(
                f"the data hold sequences of {tokens.shape[-1]} tokens, and {name} takes {context} at most "
                "(max_position_embeddings in config.json); cut them shorter"
            )
