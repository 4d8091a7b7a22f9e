"""What a tool is given and what it hands back: the same for all, so that one evaluator serves all."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from models import ENCODER, PHOTOS, SPEECH, load_model
from safetensors.torch import load_file
from torch import Tensor, nn


@dataclass
class Task:
    """A model and the calibration data.

    Parameters
    ----------
    model
        Short name, a key of ``models.TITLES``.
    folder
        The model in float32.
    data
        A safetensors file of what the model is called with, by name, the examples first: ``input_ids``,
        ``decoder_input_ids`` and their masks, padded on the right, ``input_features``, or ``x`` for images.
    scratch
        An empty folder for whatever the tool writes.
    """

    model: str
    folder: Path
    data: Path
    scratch: Path

    @property
    def language(self) -> bool:
        """Whether the model is a language model."""
        return self.model not in (ENCODER, SPEECH, PHOTOS)

    def load(self, **options: Any) -> nn.Module:
        """The model, float32 unless told otherwise."""
        model = load_model(self.model, self.folder, **options)
        if hasattr(model, "config"):
            # Calibration and latency are of single passes; nothing is generated.
            model.config.use_cache = False
        return model

    def tokenizer(self) -> Any:
        """The tokenizer of the model."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)

    def padded(self) -> dict[str, Tensor]:
        """All calibration examples in one batch."""
        return load_file(self.data)

    def sequences(self) -> list[dict[str, Tensor]]:
        """The calibration examples one by one, without their padding."""
        data = self.padded()
        return [
            _unpadded({name: tensor[i : i + 1] for name, tensor in data.items()})
            for i in range(len(next(iter(data.values()))))
        ]

    def probe(self) -> dict[str, Tensor]:
        """One example for latency: 32 tokens for an encoder, 128 for a language model."""
        if self.model in (SPEECH, PHOTOS):
            return self.sequences()[0]
        ids = self.padded()["input_ids"].flatten()[: 128 if self.language else 32][None]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _unpadded(example: dict[str, Tensor]) -> dict[str, Tensor]:
    """One example (1, tokens) without what its masks leave out."""
    for mask in [name for name in example if name.endswith("attention_mask")]:
        length = int(example[mask].sum())
        for name in (mask, mask.replace("attention_mask", "input_ids")):
            example[name] = example[name][:, :length]
    return example


@dataclass
class Compressed:
    """What a tool made of a model.

    Parameters
    ----------
    weights
        Dequantised tensors by the name they have in the model. What is not among them was left alone.
    bits
        Bits that each of these takes: its codes at their nominal width, with all scales, offsets and tables.
    runtime
        Runs a batch the tool's own way, for latency; None if the tool has no way of its own on this machine.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    bits: dict[str, float] = field(default_factory=dict)
    runtime: Callable[[dict[str, Tensor]], Any] | None = None

    def add(self, name: str, weight: Tensor, bits: float) -> None:
        """Add one tensor."""
        self.weights[name] = weight.detach().float().contiguous()
        self.bits[name] = bits


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers by name, without the output embedding of a language model."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    }


def convolutions(model: nn.Module) -> dict[str, nn.Module]:
    """Convolutions of images by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


def grid_bits(shape: torch.Size, bits: int, group: int, zero: float = 0) -> float:
    """Bits of a matrix, or of a convolution as one, with a float16 scale, and a zero point of ``zero`` bits, for every ``group`` weights of a row."""
    rows, columns = shape[0], math.prod(shape[1:])
    return rows * (columns * bits + -(-columns // group) * (16 + zero))
