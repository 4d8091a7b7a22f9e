"""The user's inputs: a source, its data, and an objective."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo.calibration.blockwise import Blockwise
from octavo.calibration.calibrating import MINIMUM_SEQUENCES
from octavo.calibration.fitting import fitting
from octavo.calibration.inmemory import InMemory
from octavo.calibration.objective import Loss, Objective, objective
from octavo.calibration.purposes import default_objective
from octavo.calibration.runner import Runner
from octavo.calibration.trying import returned, rows_are_examples, try_batches
from octavo.errors import RequestError
from octavo.sources.batches import Batch, converted, described, has_rows, left_out, select, sequences_in, whole
from octavo.sources.encoders import SentenceEncoder
from octavo.sources.files import from_path
from octavo.sources.loading import load_weights
from octavo.sources.modules import unwrapped
from octavo.sources.pretrained import adopt, is_pretrained
from octavo.sources.processors import media_batches
from octavo.sources.sentences import transformer_folder
from octavo.sources.source import Source, examine, from_module
from octavo.sources.texts import builtin_texts, check_texts, cleaned, read_texts
from octavo.sources.tokens import (
    check_tokens,
    context_of,
    further_windows,
    is_causal,
    missing_for_texts,
    text_batches,
    window_batches,
)
from octavo.system.paths import checked
from octavo.system.progress import Progress, silent

#: Every fourth sequence is held out to measure plans on, up to this many.
_HELD = 96
#: Tokens that count as one text for a language model.
TOKENS_PER_TEXT = 64
#: More texts do not improve the calibration of a language model enough to justify their time.
MOST_TEXTS = 1024
#: Tokens of texts from which a source teaches its copy: more than an hour of training takes.
_TAUGHT = 1 << 23
#: More images or sounds do not either.
MOST_FILES = 512
#: Texts for a language model are joined and split into windows of this many tokens, or of its context if shorter.
WINDOW = 256


def model_of(source: Source, *, blockwise: bool, scratch: Path | None = None) -> Runner:
    """The runnable model of a source; a folder's model is loaded now, or block by block when it runs."""
    if source.is_skeleton:
        if blockwise:
            return Blockwise(source, scratch)
        load_weights(source)
    return InMemory(source)


def open_source(source: str | Path | nn.Module | Source, *, module: bool = True, progress: Progress = silent) -> Source:
    """Open a source from a path or a module; NaN and Inf are refused.

    ``module`` is whether a folder's model will be run; if not, it is never loaded.
    """

    def examined(done: int, total: int) -> None:
        progress("open", done, total)

    if isinstance(source, nn.Module):
        source = unwrapped(source)
        opened = from_module(source)
        if is_pretrained(source):
            adopt(opened, source)
    elif isinstance(source, Source):
        opened = source
    else:
        opened = from_path(source, module=module, progress=examined)
    examine(opened, examined)
    return opened


def load_data(
    source: Source, data: Any, *, limit: int | None, forward_args: Callable[[Batch], Any] | None = None
) -> tuple[list[Batch], str]:
    """Batches from the user's data, and their description for the report.

    Parameters
    ----------
    data
        A file of texts, a folder of images or sounds, a list of texts, one batch as a tensor or mapping, or an iterable
        of batches; None takes the built-in text for a text model.
    limit
        Largest number of texts or files.
    """
    folder = source.folder
    if source.module is None:
        if data is not None:
            raise RequestError(
                f"{source.title}: has no model to run, so calibration data cannot be used; leave the data out"
            )
        return [], "none (data-free)"
    if isinstance(data, Iterable) and not isinstance(data, str | Tensor | Mapping):
        data = list(_read(data))
    if forward_args is not None and (data is None or isinstance(data, str | Path)):
        raise RequestError(
            "forward_args selects the inputs of a batch, but no batches are given; leave it out, or give data"
        )
    if isinstance(data, str | Path) and checked(data).is_dir():
        return media_batches(source, checked(data), MOST_FILES if limit is None else min(limit, MOST_FILES))
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
        folder = transformer_folder(folder)
        missing = missing_for_texts(source.module, folder)
        if missing:
            give = getattr(source.module, "main_input_name", "input_ids")
            give = give if isinstance(give, str) else give[0]
            mend = f'give batches that it takes, such as data=[{{"{give}": tensor}}] with examples first'
            if data is not None:
                raise RequestError(f"{source.title}: texts cannot be used: {missing}; {mend}")
            source.notes.append(f"compressed without data: {missing}; to calibrate and measure, {mend}")
            return [], "none (data-free)"
        texts, label = texts_of(data)
        if is_causal(source.module):
            length = min(WINDOW, context_of(source.module))
            windows = window_batches(folder, texts, length, limit=(limit or MOST_TEXTS) * TOKENS_PER_TEXT)
            count = sum(len(batch["input_ids"]) for batch in windows)
            return windows, f"{label}, {count} windows of {windows[0]['input_ids'].shape[1]} tokens"
        texts = texts[:limit]
        return text_batches(folder, texts, source.module), f"{label}, {len(texts)} texts"
    if not isinstance(data, Iterable):
        raise RequestError(f"data is {type(data).__name__}; give a file or list of texts, or an iterable of batches")
    batches = converted([data] if isinstance(data, Tensor | Mapping) else list(data), forward_args)
    total = sum(sequences_in(batch) for batch in batches)
    if not total:
        first = f" (the first is {described(batches[0])})" if batches else ""
        raise RequestError(
            f"data: no examples in {len(batches)} batches{first}; give tensors, or tuples or mappings of tensors, with "
            "examples first, or convert batches with forward_args="
        )
    return batches, f"{total} examples given"


def teaching_data(source: Source, data: Any, *, limit: int | None) -> list[Batch]:
    """Batches of the user's texts that :func:`load_data` leaves out for its limit; none of other data.

    They need no labels: a source teaches its compressed copy on them.
    """
    is_texts = isinstance(data, list) and all(isinstance(item, str) for item in data)
    named = isinstance(data, str | Path) and not checked(data).is_dir()
    if source.module is None or limit is None or not (is_texts or named):
        return []
    texts, _ = texts_of(data)
    if source.is_encoder and isinstance(source.module, SentenceEncoder):
        return source.module.batches(texts[limit:])
    assert source.folder is not None
    folder = transformer_folder(source.folder)
    if is_causal(source.module):
        length, most = min(WINDOW, context_of(source.module)), _TAUGHT
        return further_windows(folder, texts, length, limit=limit * TOKENS_PER_TEXT, most=most)
    return text_batches(folder, texts[limit : limit + _TAUGHT // TOKENS_PER_TEXT], source.module, size=64)


def _read(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches of a data loader or of any other iterable."""
    number, reader = 0, iter(batches)
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except Exception as error:
            # A user's iterable is user code and may raise any exception.
            raise RequestError(f"data: batch {number} cannot be read: {type(error).__name__}: {error}") from error
        number += 1


def prepared(source: Source, wanted: Objective, batches: Sequence[Batch]) -> list[Batch]:
    """Batches that the model accepts, split so that the outputs of each fit in memory.

    Raises
    ------
    RequestError
        If they hold tokens that the model does not know or are too long, or if a module in memory fails on one.
    """
    assert source.module is not None
    if source.is_transformers:
        check_tokens(source.module, batches)
    if not source.is_skeleton:
        try_batches(wanted, source.module, batches)
    return wanted.pieces(source.module, batches)


def notes_on(source: Source, wanted: Objective, batches: Sequence[Batch]) -> list[str]:
    """The batch keys that the module does not use. A user's loss may use any of them."""
    if source.module is None or not batches or isinstance(wanted, Loss):
        return []
    note = left_out(source.module, batches[0])
    return [] if note is None else [f"data: {note}"]


def divisible(source: Source, wanted: Objective, batches: Sequence[Batch]) -> bool:
    """Whether the rows of batches are independent examples, so that a batch can be divided."""
    if source.module is None or source.is_skeleton:
        return all(map(has_rows, batches))
    return rows_are_examples(wanted, source.module, batches)


def texts_of(data: Any) -> tuple[list[str], str]:
    """Texts of a file or a list, or the built-in texts, and their description."""
    if data is None:
        return builtin_texts(), "built-in English text"
    if isinstance(data, list):
        check_texts(data, "data")
        return cleaned(data), "texts given"
    return read_texts(data), Path(data).name


def split(batches: Sequence[Batch], *, rows: bool = True) -> tuple[list[Batch], list[Batch]]:
    """Calibration and held-out parts: of every four sequences one is held out, up to 96.

    Parameters
    ----------
    rows
        Whether batches can be divided. Otherwise one of every four batches is held out, at least one.

    Raises
    ------
    RequestError
        If there are sequences, but too few are left to calibrate on, or a single batch cannot be divided.
    """
    calibration, held = _by_rows(batches) if rows else _by_batches(batches)
    left, count = (sum(map(sequences_in, part)) for part in (calibration, held))
    if batches and left < MINIMUM_SEQUENCES:
        raise RequestError(
            f"data: of {left + count} sequences {count} are held out for measuring, which leaves {left} for "
            f"calibration; at least {MINIMUM_SEQUENCES} are needed, so give 10 or more (256 work well)"
        )
    return calibration, held


def _by_rows(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    calibration, held, seen, count = [], [], 0, 0
    for batch in batches:
        size = sequences_in(batch)
        keep = torch.ones(size, dtype=torch.bool)
        # Counted over all batches, so that batches of one sequence are divided too.
        keep[3 - seen % 4 :: 4][: _HELD - count] = False
        seen, count = seen + size, count + int((~keep).sum())
        if bool(keep.any()):
            calibration.append(select(batch, keep))
        if not bool(keep.all()):
            held.append(select(batch, ~keep))
    return calibration, held


def _by_batches(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    if len(batches) < 2:
        raise RequestError(
            f"data: the only batch ({described(batches[0])}) cannot be divided by rows, since rows depend on each "
            "other or the module needs all, so none can be held out for measuring; give at least 2 batches (10 work "
            "well)"
        )
    held = set(list(range(len(batches)))[3::4][:_HELD] or [len(batches) - 1])
    return (
        [whole(batch) for number, batch in enumerate(batches) if number not in held],
        [whole(batch) for number, batch in enumerate(batches) if number in held],
    )


def choose_objective(source: Source, wanted: str | Objective | None, batches: Sequence[Batch] = ()) -> Objective:
    """The requested objective, or the one that fits the source: by its class, or by its result on a batch."""
    if wanted is not None:
        return objective(wanted)
    known = source.module is not None and is_pretrained(source.module)
    if source.is_transformers or source.is_encoder or known:
        return default_objective(source, source.folder)
    if source.module is None or not batches:
        return objective("kl")
    return fitting(returned(source.module, batches[0]), source.module, batches[0])
