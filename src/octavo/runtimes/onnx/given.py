"""Inputs of a model, as batches for tracing, checking and timing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from octavo.calibration.objective import Batch
from octavo.errors import RequestError
from octavo.sources.source import Source

#: Height and width of images if the config does not state them.
_IMAGE = 224
#: Batch keys used only in training.
_LABELS = ("labels", "label", "label_ids")


class Inputs(ABC):
    """The inputs of a model.

    Parameters
    ----------
    axes
        Maps the numbers of dynamic axes of the exported file to names.
    """

    axes: ClassVar[dict[int, str]]

    @abstractmethod
    def example(self) -> dict[str, Tensor]:
        """A batch of more than one example for tracing and comparing."""

    @abstractmethod
    def batch(self, shape: tuple[int, int]) -> dict[str, Tensor]:
        """A batch of ``shape[0]`` examples, with ``shape[1]`` tokens if the model takes tokens."""

    @abstractmethod
    def shape(self, shape: tuple[int, int]) -> list[int]:
        """The relevant part of a shape: examples, and tokens if the model takes tokens."""

    def live(self, batch: Mapping[str, Tensor], output: Tensor) -> Tensor:
        """The part of an output that counts."""
        return output


class Tokens(Inputs):
    """``input_ids`` and ``attention_mask``; the file accepts any number of sequences and tokens."""

    axes: ClassVar = {0: "batch", 1: "tokens"}

    def __init__(self, source: Source) -> None:
        self.source = source

    def example(self) -> dict[str, Tensor]:  # noqa: D102
        length = min(24, positions(self.source))
        batch = self.batch((3, length))
        batch["attention_mask"][0, length * 2 // 3 :] = 0
        return batch

    def batch(self, shape: tuple[int, int]) -> dict[str, Tensor]:  # noqa: D102
        if shape[1] > positions(self.source):
            raise RequestError(
                f"{self.source.title}: has {positions(self.source)} positions, but shape {shape[0]}x{shape[1]} asks "
                f"for {shape[1]} tokens each; give a smaller shape"
            )
        tokens = torch.randint(0, vocabulary(self.source), shape, generator=torch.Generator().manual_seed(0))
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def shape(self, shape: tuple[int, int]) -> list[int]:  # noqa: D102
        return list(shape)

    def live(self, batch: Mapping[str, Tensor], output: Tensor) -> Tensor:  # noqa: D102
        mask = batch["attention_mask"].bool()
        return output[mask] if output.ndim > 2 else output


class Examples(Inputs):
    """Tensors by name, examples first; the file accepts any number of examples of the same size."""

    axes: ClassVar = {0: "batch"}

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    def example(self) -> dict[str, Tensor]:  # noqa: D102
        return self.batch((3, 1))

    def batch(self, shape: tuple[int, int]) -> dict[str, Tensor]:  # noqa: D102
        return {name: values[torch.arange(shape[0]) % len(values)] for name, values in self.tensors.items()}

    def shape(self, shape: tuple[int, int]) -> list[int]:  # noqa: D102
        return [shape[0]]


def inputs_of(source: Source, batches: Sequence[Batch] = ()) -> Inputs:
    """The inputs of a source: tokens, images, or those of the given batches.

    Raises
    ------
    RequestError
        If it takes other inputs, or is not a ``transformers`` model.
    """
    check_exportable(source)
    if vocabulary(source):
        return Tokens(source)
    first = next((batch for batch in batches if isinstance(batch, Mapping)), None)
    if first is not None:
        tensors = {k: v for k, v in first.items() if isinstance(v, Tensor) and v.ndim and k not in _LABELS}
        return Examples(tensors)
    config: Any = source.module.config if source.module is not None else None
    channels = getattr(config, "num_channels", None)
    if _main_input(source) == "pixel_values" and channels:
        size = getattr(config, "image_size", None) or _IMAGE
        height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
        pixels = torch.randn(4, channels, height, width, generator=torch.Generator().manual_seed(0))
        return Examples({"pixel_values": pixels})
    kind, name = type(source.module).__name__, _main_input(source)
    raise RequestError(
        f"{source.title}: {kind} cannot be exported without data; give batches of its inputs from Python, such as "
        f"[{{{name!r}: tensor}}]"
    )


def check_exportable(source: Source) -> None:
    """Raise :class:`RequestError` unless the source is a ``transformers`` model other than an encoder-decoder."""
    if source.module is None or not source.is_transformers:
        raise RequestError(
            f"{source.title}: only transformers models can be exported, and bare tensors have no graph; for another "
            "module, load the artifact into it with octavo.load(path, into=module) and call torch.onnx.export"
        )
    if getattr(source.module.config, "is_encoder_decoder", False):
        raise RequestError(
            f"{source.title}: {type(source.module).__name__} cannot be exported, since an encoder-decoder is two "
            "graphs; export an encoder, a decoder or an image model"
        )


def check_tokens_only(source: Source) -> None:
    """Raise :class:`RequestError` unless the source is a ``transformers`` model of tokens."""
    check_exportable(source)
    if not vocabulary(source):
        raise RequestError(
            f"{source.title}: {type(source.module).__name__} takes no input_ids, and --for speed only supports models "
            "of tokens; use octavo export --prefer speed for the fastest kernels"
        )


def vocabulary(source: Source) -> int:
    """Vocabulary size of a ``transformers`` model; 0 if it takes no tokens."""
    if _main_input(source) != "input_ids":
        return 0
    return int(getattr(getattr(source.module, "config", None), "vocab_size", None) or 0)


def positions(source: Source) -> int:
    """Largest number of tokens that a ``transformers`` model accepts."""
    return int(getattr(getattr(source.module, "config", None), "max_position_embeddings", None) or 2**31)


def _main_input(source: Source) -> str:
    return str(getattr(source.module, "main_input_name", "input_ids"))
