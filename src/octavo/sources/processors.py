"""Batches of images and sounds from a folder, by the processor of a ``transformers`` model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import RequestError
from octavo.sources.loading import load_weights
from octavo.sources.media import ENDINGS, Item, image, items_in, sound, texts_of_all
from octavo.sources.model_classes import require_transformers
from octavo.sources.model_kinds import is_paired, takes_tokens
from octavo.sources.sentences import transformer_folder
from octavo.sources.source import Source
from octavo.sources.texts import builtin_texts, cleaned
from octavo.sources.tokens import MAX_TOKENS, context_of, is_causal, tokenizer_of

#: Examples of one batch, where all have one shape.
_SIZE = 8
#: Names of main inputs, by what they hold.
_MAIN = {"pixel_values": "image", "input_values": "audio", "input_features": "audio", "audio_values": "audio"}
_CALLED = {"image": "images", "audio": "sounds"}
_QUESTION = {"image": "Describe this image.", "audio": "Describe this sound."}


@dataclass(frozen=True)
class _Reader:
    """What makes batches of a model from the files of a folder.

    Parameters
    ----------
    sense
        ``image`` or ``audio``.
    processor
        The model's processor, image processor or feature extractor.
    """

    source: Source
    module: Any
    folder: Path
    sense: str
    processor: Any

    def content(self, file: Path) -> Any:
        """An image, or a sound at the rate of the processor."""
        return image(file) if self.sense == "image" else sound(file, self.rate).numpy()

    @property
    def rate(self) -> int:
        """Samples per second that the processor takes."""
        extractor = getattr(self.processor, "feature_extractor", self.processor)
        return int(getattr(extractor, "sampling_rate", None) or 16_000)

    def processed(self, item: Item, **more: Any) -> dict[str, Tensor]:
        """The inputs of the model for one file."""
        content = self.content(item.file)
        if self.sense == "audio":
            more["sampling_rate"] = self.rate
            # Feature extractors have one name for their input, and processors another.
            given = "audio" if hasattr(self.processor, "feature_extractor") else "raw_speech"
        else:
            given = "images"
        try:
            made = self.processor(**{given: [content]}, return_tensors="pt", **more)
        except Exception as error:
            # A processor may raise any exception for an input that it does not take.
            raise RequestError(
                f"{item.file}: {type(self.processor).__name__} fails on it: {type(error).__name__}: {error}; remove "
                "it, or give batches"
            ) from error
        known = inspect.signature(self.module.forward).parameters
        tensors = {key: value for key, value in made.items() if isinstance(value, Tensor) and key in known}
        # Tokens come first: the rows of image patches are not examples.
        return {key: tensors[key] for key in sorted(tensors, key=lambda key: key != "input_ids")}


def media_batches(source: Source, folder: Path, most: int | None) -> tuple[list[dict[str, Tensor]], str]:
    """Batches of the images or sounds in a folder, and their description for the report.

    Every file goes through the processor of the model's folder. Files with the same shapes share a batch. A model that
    also takes text gets that of ``NAME.txt`` beside ``NAME.png``; without any such file it gets built-in sentences. A
    decoder that writes what is heard or seen gets these texts, or else what the model itself writes.

    Parameters
    ----------
    most
        Largest number of files.

    Raises
    ------
    RequestError
        If the model takes neither, the folder holds none, a file cannot be read, or the folder has no processor.
    MissingExtraError
        If a package for reading the files is not installed.
    """
    if source.module is None or source.folder is None or not source.is_transformers:
        raise RequestError(
            f"{folder}: is a folder, and reading images or sounds needs a transformers folder with its processor; give "
            "a file of texts, or batches from Python"
        )
    module = source.module
    senses = _senses(module)
    if not senses:
        raise RequestError(
            f"{folder}: is a folder, but {type(module).__name__} takes neither images nor sounds; give a file of texts"
        )
    found = {sense: items_in(folder, sense, most=most) for sense in senses}
    sense = next((sense for sense in senses if found[sense]), None)
    if sense is None:
        wanted = " or ".join(f"{_CALLED[sense]} ({', '.join(ENDINGS[sense])})" for sense in senses)
        raise RequestError(f"{folder}: holds no {wanted}, which {type(module).__name__} takes; name another folder")
    items, inner = found[sense], transformer_folder(source.folder)
    reader = _Reader(source, module, inner, sense, _processor(inner, sense, whole=takes_tokens(module)))
    label = f"{folder.name}, {len(items)} {_CALLED[sense]}"
    if takes_tokens(module):
        batches, more = _with_texts(reader, items)
    elif is_paired(module):
        batches, more = _with_decoder(reader, items)
    else:
        batches, more = [reader.processed(item) for item in items], ""
    return list(_joined(batches)), label + more


def _senses(module: nn.Module) -> list[str]:
    """``image`` and ``audio``, as far as a model takes them."""
    main, seen = getattr(module, "main_input_name", ""), getattr(module, "input_modalities", ())
    told = [seen] if isinstance(seen, str) else list(seen)
    names = [main] if isinstance(main, str) else list(main)
    return list(dict.fromkeys([*(_MAIN[name] for name in names if name in _MAIN), *(s for s in told if s in ENDINGS)]))


def _processor(folder: Path, sense: str, *, whole: bool) -> Any:
    """The processor of a folder: with its tokenizer, or the part for images or sounds alone."""
    transformers = require_transformers()
    name = "AutoProcessor" if whole else "AutoImageProcessor" if sense == "image" else "AutoFeatureExtractor"
    try:
        return getattr(transformers, name).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # It may raise any exception for missing or damaged files.
        raise RequestError(
            f"{folder}: its processor cannot be loaded, which makes inputs from {_CALLED[sense]}: {error}; copy "
            "preprocessor_config.json of the original there, or give batches from Python"
        ) from error


def _with_texts(reader: _Reader, items: Sequence[Item]) -> tuple[list[dict[str, Tensor]], str]:
    """Inputs of a model that takes tokens beside images or sounds."""
    texts, more = texts_of_all(items), " with their texts"
    if texts is None:
        known = builtin_texts()
        texts, more = [known[index % len(known)] for index in range(len(items))], " with built-in English text"
    texts = cleaned(texts)
    if is_causal(reader.module):
        prompts = [_prompt(reader, text) for text in texts]
        return [reader.processed(item, text=[text]) for item, text in zip(items, prompts, strict=True)], more
    how = {"padding": "max_length", "truncation": True, "max_length": min(MAX_TOKENS, context_of(reader.module))}
    return [reader.processed(item, text=[text], **how) for item, text in zip(items, texts, strict=True)], more


def _prompt(reader: _Reader, text: str) -> str:
    """A question on an image or sound, and its answer, as the model was trained to see them."""
    if getattr(reader.processor, "chat_template", None):
        asked = [{"type": reader.sense}, {"type": "text", "text": _QUESTION[reader.sense]}]
        turns = [("user", asked), ("assistant", [{"type": "text", "text": text}])]
        return reader.processor.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns], tokenize=False
        )
    token = getattr(reader.processor, f"{reader.sense}_token", None)
    if not isinstance(token, str):
        # Such processors add the token themselves.
        return text
    return f"{token}\n{text}"


def _with_decoder(reader: _Reader, items: Sequence[Item]) -> tuple[list[dict[str, Tensor]], str]:
    """Inputs of a model whose decoder writes what is heard or seen."""
    inputs = [reader.processed(item) for item in items]
    tokenizer, config = tokenizer_of(reader.folder), reader.module.config
    longest = min(MAX_TOKENS, context_of(reader.module), getattr(config, "max_target_positions", None) or MAX_TOKENS)
    texts, more = texts_of_all(items), " with their texts"
    if texts is None:
        texts, more = list(_written(reader, inputs, tokenizer, longest // 2)), " with what the model itself writes"
    starts = (getattr(config, name, None) for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"))
    start = next((token for token in starts if token is not None), 0)
    for batch, text in zip(inputs, texts, strict=True):
        tokens = tokenizer(text)["input_ids"]
        tokens = tokens[1:] if tokens[:1] == [start] else tokens
        batch["decoder_input_ids"] = torch.tensor([[start, *tokens[:-1]][:longest]])
    return inputs, more


def _written(reader: _Reader, inputs: Sequence[dict[str, Tensor]], tokenizer: Any, most: int) -> Iterator[str]:
    """What a model writes for its inputs by greedy decoding, at most so many tokens each."""
    if reader.source.is_skeleton:
        load_weights(reader.source)
    model: Any = reader.source.module
    for batch in _joined(inputs):
        try:
            with torch.no_grad():
                made = model.generate(**batch, max_new_tokens=most, do_sample=False, num_beams=1)
        except Exception as error:
            # A model may raise any exception for a configuration that generation does not know.
            raise RequestError(
                f"{type(model).__name__}: cannot write texts for its calibration data: {type(error).__name__}: "
                f"{error}; write NAME.txt beside every file"
            ) from error
        yield from tokenizer.batch_decode(made, skip_special_tokens=True)


def _joined(batches: Sequence[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Batches of neighbours whose tensors have one row each and the same shapes."""

    def shapes(batch: Mapping[str, Tensor]) -> tuple:
        return tuple((key, tuple(value.shape), value.dtype) for key, value in batch.items())

    key: Callable[[Mapping[str, Tensor]], tuple] = shapes
    for _, group in groupby(batches, key):
        some = list(group)
        size = _SIZE if all(len(value) == 1 for value in some[0].values()) else 1
        for at in range(0, len(some), size):
            part = some[at : at + size]
            yield {key: torch.cat([batch[key] for batch in part]) for key in part[0]}
