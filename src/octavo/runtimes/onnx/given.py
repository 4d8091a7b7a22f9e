"""What a model takes, as batches to trace, check and time it with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from octavo.calibration.objective import Batch
from octavo.errors import RequestError
from octavo.sources.sites import Source

#: Height and width of images where the config does not say.
_IMAGE = 224
#: What a batch holds for training alone.
_LABELS = ("labels", "label", "label_ids")


class Inputs(ABC):
    """What a model takes.

    Parameters
    ----------
    axes
        Number of an axis to its name, of those that the exported file leaves open.
    """

    axes: ClassVar[dict[int, str]]

    @abstractmethod
    def example(self) -> dict[str, Tensor]:
        """A batch to trace and compare with, of more than one example."""

    @abstractmethod
    def batch(self, shape: tuple[int, int]) -> dict[str, Tensor]:
        """A batch of ``shape[0]`` examples, of ``shape[1]`` tokens if they have any."""

    @abstractmethod
    def shape(self, shape: tuple[int, int]) -> list[int]:
        """What of a shape says something: examples, and tokens if they have any."""

    def live(self, batch: Mapping[str, Tensor], output: Tensor) -> Tensor:
        """What of an output counts."""
        return output


class Tokens(Inputs):
    """``input_ids`` and ``attention_mask``; the file takes any number of sequences and tokens."""

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
                f"{self.source.title}: has {positions(self.source)} positions, {shape[0]}x{shape[1]} asks for "
                f"{shape[1]} tokens each"
            )
        tokens = torch.randint(0, vocabulary(self.source), shape, generator=torch.Generator().manual_seed(0))
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def shape(self, shape: tuple[int, int]) -> list[int]:  # noqa: D102
        return list(shape)

    def live(self, batch: Mapping[str, Tensor], output: Tensor) -> Tensor:  # noqa: D102
        mask = batch["attention_mask"].bool()
        return output[mask] if output.ndim > 2 else output


class Examples(Inputs):
    """Tensors by name, examples first; the file takes any number of examples of the same size."""

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
    """What a source takes: tokens, images, or what the batches that were given hold.

    Raises
    ------
    RequestError
        If it takes something else, or is no ``transformers`` model.
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
        f"{source.title}: {kind} cannot be exported without data; give batches of what it takes, such as "
        f"[{{{name!r}: tensor}}], from Python"
    )


def check_exportable(source: Source) -> None:
    """Raise :class:`RequestError` unless the source is a ``transformers`` model other than an encoder-decoder."""
    if source.module is None or not source.is_transformers:
        raise RequestError(
            f"{source.title}: only transformers models can be exported, bare tensors have no graph; for another "
            "module, load the artifact into it with octavo.load(path, into=module) and call torch.onnx.export"
        )
    if getattr(source.module.config, "is_encoder_decoder", False):
        raise RequestError(
            f"{source.title}: {type(source.module).__name__} cannot be exported: an encoder with a decoder is two "
            "graphs; encoders, decoders and models of images can"
        )


def check_tokens_only(source: Source) -> None:
    """Raise :class:`RequestError` unless the source is a ``transformers`` model of tokens."""
    check_exportable(source)
    if not vocabulary(source):
        raise RequestError(
            f"{source.title}: {type(source.module).__name__} takes no input_ids; --for speed searches models of "
            "tokens only. octavo export --prefer speed writes it with the fastest kernels"
        )


def vocabulary(source: Source) -> int:
    """Number of tokens that a ``transformers`` model knows; 0 if it takes none."""
    if _main_input(source) != "input_ids":
        return 0
    return int(getattr(getattr(source.module, "config", None), "vocab_size", None) or 0)


def positions(source: Source) -> int:
    """Tokens that a ``transformers`` model takes at most."""
    return int(getattr(getattr(source.module, "config", None), "max_position_embeddings", None) or 2**31)


def _main_input(source: Source) -> str:
    return str(getattr(source.module, "main_input_name", "input_ids"))
