"""A model's outputs on a fixed input, by which it is known again elsewhere."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from octavo.system.raw import raw_bytes

#: Values of the outputs that are recorded.
_SAMPLES = 64
#: Values that a fixed input has at most: an image of 1,600 by 1,600 in three colours.
_LARGEST = 1 << 23
#: What another machine, or another number of threads, may change of an output of size one.
TOLERANCE = 2e-3


@dataclass(frozen=True)
class Outputs:
    """What a model gave.

    Parameters
    ----------
    sha256
        Of all values.
    scale
        The largest of them.
    samples
        Some of them, evenly spaced.
    """

    sha256: str
    scale: float
    samples: tuple[float, ...]

    def differ(self, other: Outputs) -> float:
        """How far two outputs are apart, in units of the larger scale; infinite if they are not alike at all."""
        if self.sha256 == other.sha256:
            return 0.0
        one, two = torch.tensor(self.samples), torch.tensor(other.samples)
        if one.shape != two.shape or not bool(torch.isfinite(one - two).all()):
            return float("inf")
        apart = float((one - two).abs().max()) if one.numel() else 0.0
        return max(apart, abs(self.scale - other.scale)) / max(self.scale, other.scale, 1e-30)


def probe(module: nn.Module, seed: int = 0) -> Outputs | None:
    """Outputs of a transformers model on a fixed random input; None for what takes none that is known."""
    values = first_output(module, seed)
    if values is None:
        return None
    flat = values.detach().float().flatten()
    places = torch.linspace(0, len(flat) - 1, min(_SAMPLES, len(flat))).long()
    scale = float(flat.abs().max()) if len(flat) else 0.0
    return Outputs(hashlib.sha256(raw_bytes(values)).hexdigest(), scale, tuple(flat[places].tolist()))


def first_output(module: nn.Module, seed: int = 0) -> Tensor | None:
    """The first tensor that a model gives for :func:`fixed_input`, or None."""
    batch = fixed_input(module, seed)
    if batch is None:
        return None
    try:
        with torch.inference_mode():
            result = module(**batch)
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError, NotImplementedError):
        # A model may need more than can be told from its configuration; then there is nothing to know it by.
        return None
    values = result.values() if isinstance(result, dict) else result if isinstance(result, tuple | list) else [result]
    return next((value for value in values if isinstance(value, Tensor) and value.is_floating_point()), None)


def fixed_input(module: nn.Module, seed: int = 0) -> dict[str, Tensor] | None:
    """Random tokens or pixels that a transformers model takes, by its configuration; None for other inputs."""
    config: Any = getattr(module, "config", None)
    name = getattr(module, "main_input_name", None)
    generator = torch.Generator().manual_seed(seed)
    if config is None:
        return None
    if name == "input_ids":
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        vocabulary = getattr(text, "vocab_size", None) or getattr(config, "vocab_size", None)
        if not vocabulary:
            return None
        tokens = torch.randint(0, vocabulary, (2, 16), generator=generator)
        paired = getattr(config, "is_encoder_decoder", False)
        return {"input_ids": tokens, **({"decoder_input_ids": tokens[:, :8]} if paired else {})}
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if name == "pixel_values" and channels and isinstance(size, int | list | tuple):
        sizes = [channels, *((size, size) if isinstance(size, int) else size)][:3]
        # A configuration may name any size, whatever its weights are.
        if len(sizes) < 3 or not all(type(one) is int and one > 0 for one in sizes) or math.prod(sizes) > _LARGEST:
            return None
        return {"pixel_values": torch.randn(1, *sizes, generator=generator)}
    return None
