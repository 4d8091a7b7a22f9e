"""Encoders of ``sentence-transformers`` as modules: loaded as their users do, and bound to the tensors of a source."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import MissingExtraError, OctavoError, RequestError
from octavo.sources.conversions import Conversion
from octavo.sources.names import names_of
from octavo.sources.sentences import DENSE, members, model_type
from octavo.sources.source import Source

_BATCH = 32
_KINDS = (DENSE, "SparseEncoder", "CrossEncoder")


class SentenceEncoder(nn.Module):
    """An encoder as a module that takes its features by name and returns one vector per example.

    Parameters
    ----------
    encoder
        A ``SentenceTransformer``.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        prompt = self._prompt()
        # Pooling leaves out the prompt if it knows the prompt length and its configuration requires it.
        self._prompt_length = encoder.preprocess([""], **prompt).get("prompt_length") if prompt else None

    @property
    def transformer(self) -> nn.Module | None:
        """The ``transformers`` model inside, or None."""
        model = getattr(self.encoder[0], "model", None)
        return model if isinstance(model, nn.Module) and hasattr(model, "base_model_prefix") else None

    def forward(self, **features: Any) -> Tensor:
        """Sentence vectors (examples, dimensions)."""
        if type(self.encoder[0]).__name__ == "StaticEmbedding" and "offsets" not in features:
            features = _flat(features["input_ids"], features["attention_mask"])
        if self._prompt_length is not None:
            features = {"prompt_length": self._prompt_length, **features}
        result: Tensor = self.encoder(dict(features))["sentence_embedding"]
        return result

    def batches(self, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        """Batches of texts tokenized by the encoder's tokenizer; texts of similar length share a batch."""
        ordered, prompt = sorted(texts, key=len), self._prompt()
        made = (self.encoder.preprocess(ordered[at : at + _BATCH], **prompt) for at in range(0, len(ordered), _BATCH))
        return [_padded({k: v for k, v in batch.items() if isinstance(v, Tensor)}) for batch in made]

    def _prompt(self) -> dict[str, str]:
        """The default prompt put before every text, if any."""
        name = self.encoder.default_prompt_name
        prompt = self.encoder.prompts.get(name) if name is not None else None
        return {"prompt": prompt} if prompt else {}


def _flat(tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Concatenated tokens with the offsets of examples, the input of a static table."""
    lengths = mask.sum(1)
    return {"input_ids": tokens[mask.bool()], "offsets": lengths.cumsum(0) - lengths}


def _padded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse: one row per example, so that batches can be divided."""
    if "offsets" not in batch:
        return batch
    parts = batch["input_ids"].tensor_split(batch["offsets"][1:].tolist())
    tokens = nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(part) for part in parts], batch_first=True)
    return {"input_ids": tokens, "attention_mask": mask}


def load_encoder(folder: Path) -> SentenceEncoder:
    """Load an encoder's folder or artifact as its users do, in float32.

    Raises
    ------
    MissingExtraError
        If ``sentence-transformers`` is not installed.
    RequestError
        If it cannot be loaded.
    """
    try:
        import sentence_transformers
    except ImportError as error:
        raise MissingExtraError(
            f"{folder}: needs sentence-transformers, which cannot be imported ({error}): pip install 'octavo[st]'"
        ) from error
    kind = model_type(folder)
    if kind not in _KINDS:
        raise RequestError(f"{folder}: is a {kind[:80]!r}, which is not supported; give one of {', '.join(_KINDS)}")
    try:
        encoder = getattr(sentence_transformers, kind)(
            str(folder), device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32}
        )
        return SentenceEncoder(encoder.eval()).eval()
    except OctavoError:
        raise
    except Exception as error:
        # Each module reads its own configuration and may raise any exception.
        raise RequestError(f"{folder}: {kind} cannot load it: {error}") from error


def is_installed() -> bool:
    """Whether encoders can be loaded with ``sentence-transformers``."""
    return importlib.util.find_spec("sentence_transformers") is not None


def bind_encoder(source: Source, encoder: SentenceEncoder, folder: Path) -> None:
    """Set the mapping of the source's tensors to the modules of an encoder."""
    every = source.every_shape()
    parameters: dict[str, str] = {}
    conversions: list[Conversion] = []
    state = encoder.state_dict()
    modules = dict(encoder.encoder.named_children())
    for member, (child, module) in zip(members(folder), modules.items(), strict=True):
        prefix = f"{member.path}/" if member.path else ""
        own = {n.removeprefix(prefix): s for n, s in every.items() if n.startswith(prefix) and (prefix or "/" not in n)}
        model = encoder.transformer if module is encoder.encoder[0] else None
        if model is None:
            place = f"encoder.{child}."
            parameters.update(
                (prefix + name, place + name)
                for name, shape in own.items()
                if place + name in state and tuple(state[place + name].shape) == shape
            )
            continue
        place = f"encoder.{child}.model."
        found = names_of(model, own)
        parameters.update((prefix + name, place + target) for name, target in found.parameters.items())
        for item in found.conversions:
            names, targets = tuple(prefix + n for n in item.names), tuple(place + t for t in item.targets)
            conversions.append(Conversion(names, targets, _prefixed(item.function, place)))
            parameters.update(dict.fromkeys(names, targets[0]))
        source.unfilled = found.missing
    source.parameters, source.conversions = parameters, conversions
    source.unused = [name for name in source.shapes if name not in parameters]


def _prefixed(
    function: Callable[[Sequence[Tensor]], dict[str, Tensor]], place: str
) -> Callable[[Sequence[Tensor]], dict[str, Tensor]]:
    return lambda tensors: {place + name: value for name, value in function(tensors).items()}
