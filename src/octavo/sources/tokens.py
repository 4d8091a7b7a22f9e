"""Texts as batches of tokens, for ``transformers`` models."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import RequestError
from octavo.sources.model_classes import require_transformers
from octavo.sources.model_kinds import is_paired, takes_tokens
from octavo.sources.texts import MINIMUM_TEXTS

#: Longer texts are truncated: calibration gains little from them, and its cost grows with the square of the length.
MAX_TOKENS = 128
_SHORTEST_WINDOW = 16
#: Models whose decoder needs its own tokens; other heads derive them from the encoder's tokens.
_GIVEN_TOKENS = re.compile("Model$|Generation$")


def text_batches(
    folder: Path, texts: Sequence[str], module: nn.Module | None = None, *, size: int = 32
) -> list[dict[str, Tensor]]:
    """Tokenised, padded batches of texts. Texts of similar length share a batch, so there is little padding.

    A default prompt of ``sentence-transformers`` is put before every text. With a ``module`` batches only have its
    inputs and fit its context. A decoder gets the same text, shifted right by one token.
    """
    tokenizer = tokenizer_of(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise RequestError(f"{folder}: the tokenizer has no token for padding; set pad_token in tokenizer_config.json")
    longest = MAX_TOKENS if module is None else min(MAX_TOKENS, context_of(module))
    prompt = prompt_of(folder)
    ordered = [prompt + text for text in sorted(texts, key=len)]
    batches = []
    for at in range(0, len(ordered), size):
        some = ordered[at : at + size]
        batch = dict(tokenizer(some, padding=True, truncation=True, max_length=longest, return_tensors="pt"))
        batches.append(batch if module is None else _taken(module, {**batch, **_decoded(module, batch)}))
    return batches


def _taken(module: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of a batch that a model accepts: general tokenizers also produce token types."""
    known = inspect.signature(module.forward).parameters
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values()):
        return batch if "token_type_ids" in known else {key: batch[key] for key in batch if key != "token_type_ids"}
    return {key: value for key, value in batch.items() if key in known}


def _decoded(module: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tokens of a batch for the decoder that predicts them; empty for heads that derive them."""
    if not is_paired(module) or not _GIVEN_TOKENS.search(type(module).__name__):
        return {}
    config = module.config
    starts = (config.decoder_start_token_id, getattr(config, "bos_token_id", None), config.pad_token_id, 0)
    start = next(token for token in starts if token is not None)

    def shifted(tokens: Tensor, first: int) -> Tensor:
        return torch.cat([torch.full_like(tokens[:, :1], first), tokens[:, :-1]], 1)

    return {
        "decoder_input_ids": shifted(batch["input_ids"], start),
        "decoder_attention_mask": shifted(batch["attention_mask"], 1),
    }


def prompt_of(folder: Path) -> str:
    """The default prompt of ``sentence-transformers`` before every text; empty if there is none."""
    file = folder / "config_sentence_transformers.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        name = config.get("default_prompt_name")
        return str(config["prompts"][name]) if name is not None else ""
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise RequestError(f"{file}: the default prompt cannot be read: {error!r}; correct the file") from error


def prompt_length(folder: Path) -> int:
    """Number of tokens of the default prompt, as counted by ``sentence-transformers``."""
    prompt = prompt_of(folder)
    if not prompt:
        return 0
    tokenizer = tokenizer_of(folder)
    tokens = tokenizer(prompt)["input_ids"]
    return len(tokens) - (tokens[-1] in tokenizer.all_special_ids)


def missing_for_texts(module: nn.Module, folder: Path) -> str:
    """The reason why a model cannot run on texts only; empty if it can."""
    name = type(module).__name__
    main = getattr(module, "main_input_name", "input_ids")
    if not takes_tokens(module):
        return f"{name} takes {main if isinstance(main, str) else ' and '.join(main)}, not text"
    seen = getattr(module, "input_modalities", "text")
    others = [kind for kind in ([seen] if isinstance(seen, str) else seen) if kind != "text"]
    if others and not is_causal(module):
        return f"{name} takes {' and '.join(others)} besides text"
    try:
        tokenizer_of(folder)
    except RequestError as error:
        return str(error)
    return ""


def is_causal(module: nn.Module | None) -> bool:
    """Whether a model predicts the next token; models with images or sound too do so from text."""
    name = type(module).__name__
    if name.endswith("ForConditionalGeneration"):
        return module is not None and not is_paired(module) and takes_tokens(module)
    return name.endswith(("ForCausalLM", "LMHeadModel"))


def context_of(module: nn.Module) -> int:
    """Largest number of tokens per input of a model; a very large number if unknown."""
    config: Any = getattr(module, "config", None)
    config = config.get_text_config() if config is not None else None
    longest = int(getattr(config, "max_position_embeddings", None) or 0)
    return longest if longest > 0 else 2**31


def window_batches(
    folder: Path, texts: Sequence[str], length: int, *, limit: int | None = None, size: int = 4
) -> list[dict[str, Tensor]]:
    """Batches of windows of equal length, without padding, cut from the concatenated texts.

    So every position predicts from text, whatever the batch size.

    Parameters
    ----------
    length
        Tokens per window; fewer if the texts would not fill ten windows.
    limit
        Largest number of tokens; windows are then spread evenly over the texts.
    """
    windows = _windows(folder, texts, length)
    rows = torch.tensor([windows[place] for place in _spread(windows, limit)])
    return [{"input_ids": rows[at : at + size]} for at in range(0, len(rows), size)]


def further_windows(
    folder: Path, texts: Sequence[str], length: int, *, limit: int | None, most: int, size: int = 8
) -> list[dict[str, Tensor]]:
    """The windows that :func:`window_batches` leaves out for its limit, up to ``most`` tokens; perhaps none."""
    windows = _windows(folder, texts, length)
    taken = set(_spread(windows, limit))
    left = [window for place, window in enumerate(windows) if place not in taken][: most // len(windows[0])]
    rows = torch.tensor(left)
    return [{"input_ids": rows[at : at + size]} for at in range(0, len(rows), size)]


def _spread(windows: Sequence[Sequence[int]], limit: int | None) -> list[int]:
    """Places of windows of at most so many tokens, evenly over all."""
    count = len(windows) if limit is None else max(limit // len(windows[0]), MINIMUM_TEXTS)
    count = min(count, len(windows))
    return [index * len(windows) // count for index in range(count)]


def _windows(folder: Path, texts: Sequence[str], length: int) -> list[list[int]]:
    """All windows of texts, at least ten."""
    tokenizer = tokenizer_of(folder)
    tokens = tokenizer("\n".join(texts), add_special_tokens=False)["input_ids"]
    # Models trained with a first token perform badly without it.
    first = tokenizer("", add_special_tokens=True)["input_ids"][:1] if tokenizer.bos_token_id is not None else []
    first = [token for token in first if token == tokenizer.bos_token_id]
    length = min(length, max(_SHORTEST_WINDOW, len(tokens) // (2 * MINIMUM_TEXTS)))
    stride = length - len(first)
    starts = range(0, len(tokens) - stride + 1, stride)
    if len(starts) < MINIMUM_TEXTS:
        raise RequestError(
            f"data: the texts hold {len(tokens)} tokens, {len(starts)} windows of {length}; give at least "
            f"{MINIMUM_TEXTS * length} tokens (32,000 work well for a language model)"
        )
    return [first + tokens[start : start + stride] for start in starts]


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a model folder.

    Raises
    ------
    RequestError
        If it cannot be loaded, or the folder has none.
    """
    try:
        found = require_transformers().AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        # A tokenizer may raise any exception for invalid files.
        raise RequestError(
            f"{folder}: its tokenizer cannot be loaded, but calibration data is text: {error}; repair the tokenizer's "
            "files, or give batches"
        ) from error
    # Without any file transformers creates a tokenizer with an empty vocabulary.
    files = set(found.vocab_files_names.values())
    if files and not any((folder / name).exists() for name in (*files, "tokenizer.json")):
        raise RequestError(
            f"{folder}: calibration data is text, but the folder has no tokenizer (none of "
            f"{', '.join(sorted(files))}); copy the tokenizer's files into the folder, or give batches"
        )
    return found


def check_tokens(module: Any, batches: Sequence[Any]) -> None:
    """Refuse tokens outside of the model's vocabulary, and sequences longer than its context.

    Raises
    ------
    RequestError
        If there are any; the error names the token or the length.
    """
    try:
        words = getattr(module.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:
        # Audio models have no token table, and models with several kinds of input may have several.
        words = None
    context = context_of(module)
    name = type(module).__name__
    paired = is_paired(module)
    for batch in batches:
        keys = ("decoder_input_ids",) if paired and not takes_tokens(module) else ("input_ids", "decoder_input_ids")
        for key in keys if isinstance(batch, Mapping) else ():
            if isinstance(batch.get(key), Tensor) and batch[key].numel():
                _check(name, batch[key], words, context)


def _check(name: str, tokens: Tensor, words: int | None, context: int) -> None:
    least, most = int(tokens.min()), int(tokens.max())
    if words is not None and (least < 0 or most >= words):
        raise RequestError(
            f"data: holds token {least if least < 0 else most}, but {name} knows tokens 0 to {words - 1}, so the "
            "tokenizer belongs to another model; use the tokenizer published with the model"
        )
    if tokens.shape[-1] > context:
        raise RequestError(
            f"data: holds sequences of {tokens.shape[-1]} tokens, but {name} takes at most {context} "
            "(max_position_embeddings in config.json); shorten them"
        )
