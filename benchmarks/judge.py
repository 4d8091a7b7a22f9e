"""One judge for all tools: what weights cost in bytes, and what they do to the model's outputs on held-out data."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from common import CACHE
from models import load_model, model_folder
from torch import Tensor, nn


class Judge(ABC):
    """A model as it came, and how far a changed one is from it.

    Parameters
    ----------
    name
        Short name of the model.
    """

    #: What quality is, lower is better; and what a user of such a model looks at.
    metric: str
    second_metric: str | None = None
    #: Quality from which on a model is of no use at any size.
    hopeless: float
    #: What Octavo calibrates with, and its options for this model.
    data: Any
    options: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, name: str) -> None:
        self.name, self.folder = name, model_folder(name)
        self.model = load_model(name, self.folder)
        self.live = _tensors(self.model)
        #: Every distinct tensor once: a tied head is its embedding.
        self.original = {name: tensor.detach().clone() for name, tensor in self.live.items()}
        self.weights = sum(tensor.numel() for tensor in self.original.values())
        self.embedding = self._embedding()

    def _embedding(self) -> str | None:
        """The name of the token embedding, which most tools leave alone."""
        if not hasattr(self.model, "get_input_embeddings"):
            return None
        try:
            table = self.model.get_input_embeddings().weight
        except NotImplementedError:
            return None
        return next((name for name, tensor in self.live.items() if tensor is table), None)

    @property
    def source(self) -> Any:
        """What Octavo is given."""
        return self.folder

    def reload(self, artifact: Path) -> nn.Module:
        """The model of an artifact, as its users load it."""
        return load_model(self.name, artifact)

    def size(self, bits: Mapping[str, float]) -> int:
        """Bytes of a model with some tensors at so many bits, and the others at 16 bits a weight."""
        total = sum(bits.get(name, 16 * tensor.numel()) for name, tensor in self.original.items())
        return math.ceil(total / 8)

    def quality(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Quality with some tensors changed, and the others rounded to float16, at which they are counted."""
        unknown = set(weights) - set(self.original)
        if unknown:
            raise KeyError(f"the model has no tensor {sorted(unknown)[0]!r}")
        with torch.no_grad():
            for name, tensor in self.live.items():
                tensor.copy_(weights[name] if name in weights else self.original[name].half())
        return self.measure(self.model)

    @abstractmethod
    def measure(self, model: nn.Module) -> dict[str, float]:
        """``quality``, and ``second`` if there is a second measure."""

    def generates(self, model: nn.Module) -> bool | None:
        """Whether a loaded artifact writes text; None of a model that writes none."""
        return None

    @abstractmethod
    def inputs(self) -> dict[str, Tensor]:
        """The calibration data as every tool gets them, the first dimension being the examples."""


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The floating tensors that a file of the model holds, by name; those that are tied once."""
    stored = model.state_dict().keys()
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor for name, tensor in named if name in stored and tensor.is_floating_point()}


def divergence(before: Tensor, after: Tensor) -> float:
    """Sum over all positions of the KL divergence of two tensors of log-probabilities (..., classes)."""
    return float(nn.functional.kl_div(after, before, reduction="sum", log_target=True))


def round_to_nearest(weight: Tensor, bits: int, group: int = 64) -> tuple[Tensor, float]:
    """A matrix rounded to asymmetric grids of ``group`` weights, with float16 scales, and the bits it takes."""
    rows, columns = weight.shape
    if columns % group:
        raise ValueError(f"{columns} columns are no multiple of {group}")
    groups = weight.float().reshape(rows, columns // group, group)
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    high = groups.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).half().float().clamp(min=2**-24)
    zero = (-low / scale).round_().clamp_(0, 2**bits - 1)
    codes = (groups / scale + zero).round_().clamp_(0, 2**bits - 1)
    return codes.sub_(zero).mul_(scale).reshape(rows, columns), rows * (columns * bits + columns // group * (16 + bits))


def work_folder(model: str, tool: str, setting: str) -> Path:
    """Where a run keeps its task and its result until they are judged."""
    return CACHE / "bench" / model / tool / re.sub(r"[^A-Za-z0-9.=]+", "-", setting)
