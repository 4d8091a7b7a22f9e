"""What a user gives: a source, data for it, and an objective."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from octavo.blockwise import Blockwise
from octavo.calibrate import MINIMUM_SEQUENCES
from octavo.data.texts import builtin_texts, check_texts, cleaned, read_texts
from octavo.errors import RequestError
from octavo.files import from_path
from octavo.inmemory import InMemory
from octavo.integrations.sentences import SentenceEncoder, transformer_folder
from octavo.objective import Batch, Objective, objective, select, sequences_in
from octavo.progress import Progress, silent
from octavo.sites import Source, examine, from_module

#: Every fourth sequence is held back from calibration to measure plans on, but no more than this many.
_HELD = 96
#: Tokens of a language model that are read in place of one text.
TOKENS_PER_TEXT = 64
#: Texts beyond these do not make the calibration of a language model better by what they take of time.
MOST_TEXTS = 1024
#: Texts of a language model are joined and cut into windows of this many tokens, or of its context if shorter.
WINDOW = 256


def model_of(source: Source, *, blockwise: bool) -> InMemory | Blockwise:
    """The model of a source, to be run; that of a folder is loaded now, or block by block whenever it is run."""
    if source.is_skeleton:
        if blockwise:
            return Blockwise(source)
        from octavo.integrations.transformers import load_weights

        load_weights(source)
    return InMemory(source)


def open_source(source: str | Path | nn.Module | Source, *, module: bool = True, progress: Progress = silent) -> Source:
    """A source from a path or a module; NaN and Inf in it are refused.

    ``module`` says whether a folder's model will be run; if not, it is never loaded.
    """

    def examined(done: int, total: int) -> None:
        progress("open", done, total)

    if isinstance(source, nn.Module):
        opened = from_module(source)
    elif isinstance(source, Source):
        opened = source
    else:
        opened = from_path(source, module=module, progress=examined)
    examine(opened, examined)
    return opened


def load_data(source: Source, data: Any, *, limit: int | None) -> tuple[list[Batch], str]:
    """Batches from what the user gave, and what to call them in the report.

    ``data`` is a file of texts, a list of texts, or an iterable of batches; None takes the built-in text for a text
    model.
    """
    folder = source.folder
    if source.module is None:
        if data is not None:
            raise RequestError(f"{source.title}: without a model, calibration data cannot be used; leave it out")
        return [], "none (data-free)"
    is_texts = isinstance(data, list) and data and all(isinstance(item, str) for item in data)
    if data is None or isinstance(data, str | Path) or is_texts:
        if source.is_encoder and isinstance(source.module, SentenceEncoder):
            texts, label = texts_of(data)
            return source.module.batches(texts[:limit]), f"{label}, {len(texts[:limit])} texts"
        if folder is None or not source.is_transformers:
            if data is None:
                return [], "none (data-free)"
            raise RequestError(
                f"{source.title}: texts need a transformers folder with a tokenizer; give batches instead"
            )
        from octavo.integrations.texts import context_of, is_causal, text_batches, window_batches

        folder = transformer_folder(folder)
        texts, label = texts_of(data)
        if is_causal(source.module):
            length = min(WINDOW, context_of(source.module))
            windows = window_batches(folder, texts, length, limit=(limit or MOST_TEXTS) * TOKENS_PER_TEXT)
            count = sum(len(batch["input_ids"]) for batch in windows)
            return windows, f"{label}, {count} windows of {windows[0]['input_ids'].shape[1]} tokens"
        texts = texts[:limit]
        return text_batches(folder, texts), f"{label}, {len(texts)} texts"
    if not isinstance(data, Iterable):
        raise RequestError(f"data is {type(data).__name__}; give a file or list of texts, or an iterable of batches")
    batches = list(data)
    total = sum(sequences_in(batch) for batch in batches)
    if not total:
        raise RequestError(
            f"data: no examples in {len(batches)} batches; a batch is a tensor, or a tuple or mapping of tensors, "
            "examples first"
        )
    return batches, f"{total} examples given"


def prepared(source: Source, wanted: Objective, batches: Sequence[Batch]) -> list[Batch]:
    """Batches that a model can take, cut so that the outputs of each fit in memory.

    Raises
    ------
    RequestError
        If they hold tokens that the model does not know, or are longer than it takes.
    """
    assert source.module is not None
    if source.is_transformers:
        from octavo.integrations.texts import check_tokens

        check_tokens(source.module, batches)
    return wanted.pieces(source.module, batches)


def texts_of(data: Any) -> tuple[list[str], str]:
    """Texts of a file or a list, or the built-in ones, and what to call them."""
    if data is None:
        return builtin_texts(), "built-in English text"
    if isinstance(data, list):
        check_texts(data, "data")
        return cleaned(data), "texts given"
    return read_texts(data), Path(data).name


def split(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Calibration and held-back parts: of every four sequences, one is held back, up to 96.

    Raises
    ------
    RequestError
        If there are sequences, but too few are left to calibrate on.
    """
    calibration, held, seen, count = [], [], 0, 0
    for batch in batches:
        size = sequences_in(batch)
        keep = torch.ones(size, dtype=torch.bool)
        # Counted over all batches, so that batches of one sequence are divided as well.
        keep[3 - seen % 4 :: 4][: _HELD - count] = False
        seen, count = seen + size, count + int((~keep).sum())
        if bool(keep.any()):
            calibration.append(select(batch, keep))
        if not bool(keep.all()):
            held.append(select(batch, ~keep))
    if seen and seen - count < MINIMUM_SEQUENCES:
        raise RequestError(
            f"data: of {seen} sequences {count} are held back to measure on, and {seen - count} left to calibrate on; "
            f"at least {MINIMUM_SEQUENCES} are needed, so give 10 or more (256 serve well)"
        )
    return calibration, held


def choose_objective(source: Source, wanted: str | Objective | None) -> Objective:
    """The objective asked for, or the one that fits the source."""
    if wanted is not None:
        return objective(wanted)
    if source.is_transformers or source.is_encoder:
        from octavo.integrations.transformers import default_objective

        return default_objective(source, source.folder)
    return objective("kl")
