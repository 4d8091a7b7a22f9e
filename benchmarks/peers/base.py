"""What a tool is given and what it hands back: the same for all, so that one evaluator serves all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


@dataclass
class Task:
    """A model and the calibration text.

    Parameters
    ----------
    model
        Short name: ``minilm``, ``smollm2``, ``gemma``.
    folder
        The model in float32, as ``transformers`` loads it.
    data
        A safetensors file with ``input_ids`` and ``attention_mask``, (sequences, tokens), padded on the right.
    scratch
        An empty folder for whatever the tool writes.
    """

    model: str
    folder: Path
    data: Path
    scratch: Path

    @property
    def encoder(self) -> bool:
        """Whether the model is no language model."""
        return self.model == "minilm"

    def load(self, **options: Any) -> nn.Module:
        """The model, float32 unless told otherwise."""
        from transformers import AutoModel, AutoModelForCausalLM

        kind = AutoModel if self.encoder else AutoModelForCausalLM
        model = kind.from_pretrained(self.folder, **{"dtype": torch.float32, **options}).eval()
        # Calibration and latency are of single passes; nothing is generated.
        model.config.use_cache = False
        return model

    def tokenizer(self) -> Any:
        """The tokenizer of the model."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)

    def padded(self) -> dict[str, Tensor]:
        """All calibration sequences in one batch."""
        return load_file(self.data)

    def sequences(self) -> list[dict[str, Tensor]]:
        """The calibration sequences one by one, (1, tokens), without their padding."""
        data = self.padded()
        lengths = data["attention_mask"].sum(1).tolist()
        return [{name: tensor[i : i + 1, :length] for name, tensor in data.items()} for i, length in enumerate(lengths)]

    def probe(self) -> dict[str, Tensor]:
        """One sequence for latency: 32 tokens for an encoder, 128 for a language model."""
        length = 32 if self.encoder else 128
        ids = self.padded()["input_ids"].flatten()[:length][None]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


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


def grid_bits(shape: torch.Size, bits: int, group: int, zero: float = 0) -> float:
    """Bits of a matrix with one float16 scale, and a zero point of ``zero`` bits, for every ``group`` weights of a row."""
    rows, columns = shape
    return rows * (columns * bits + -(-columns // group) * (16 + zero))
