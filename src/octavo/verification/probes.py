"""A model's outputs on a fixed input, used to recognise the model on another machine."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from octavo.system.raw import raw_bytes

#: Number of output values recorded.
_SAMPLES = 64
#: Largest number of values in a fixed input: an image of 1,600 by 1,600 with three channels.
_LARGEST = 1 << 23
#: Tolerance for outputs of size one between machines and numbers of threads.
TOLERANCE = 2e-3


@dataclass(frozen=True)
class Outputs:
    """A model's outputs on the fixed input.

    Parameters
    ----------
    sha256
        Hash of all values.
    scale
        The largest magnitude.
    samples
        Some of the values, evenly spaced.
    """

    sha256: str
    scale: float
    samples: tuple[float, ...]

    def differ(self, other: Outputs) -> float:
        """The distance of two outputs in units of the larger scale; infinite if they cannot be compared."""
        if self.sha256 == other.sha256:
            return 0.0
        one, two = torch.tensor(self.samples), torch.tensor(other.samples)
        if one.shape != two.shape or not bool(torch.isfinite(one - two).all()):
            return float("inf")
        apart = float((one - two).abs().max()) if one.numel() else 0.0
        return max(apart, abs(self.scale - other.scale)) / max(self.scale, other.scale, 1e-30)


def probe(module: nn.Module, seed: int = 0) -> Outputs | None:
    """Outputs of a transformers model on a fixed random input; None if its input type is unknown."""
    values = first_output(module, seed)
    if values is None:
        return None
    flat = values.detach().float().flatten()
    places = torch.linspace(0, len(flat) - 1, min(_SAMPLES, len(flat))).long()
    scale = float(flat.abs().max()) if len(flat) else 0.0
    return Outputs(hashlib.sha256(raw_bytes(values)).hexdigest(), scale, tuple(flat[places].tolist()))


def first_output(module: nn.Module, seed: int = 0) -> Tensor | None:
    """The first tensor that a model returns for :func:`fixed_input`, or None."""
    batch = fixed_input(module, seed)
    if batch is None:
        return None
    try:
        with torch.inference_mode():
            result = module(**batch)
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError, NotImplementedError):
        # A model may need inputs that its configuration does not reveal; then there is no probe.
        return None
    values = result.values() if isinstance(result, dict) else result if isinstance(result, tuple | list) else [result]
    return next((value for value in values if isinstance(value, Tensor) and value.is_floating_point()), None)


def fixed_input(module: nn.Module, seed: int = 0) -> dict[str, Tensor] | None:
    """Random tokens or pixels for a transformers model, by its configuration; None for other inputs."""
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
        # A configuration may state any size.
        if len(sizes) < 3 or not all(type(one) is int and one > 0 for one in sizes) or math.prod(sizes) > _LARGEST:
            return None
        return {"pixel_values": torch.randn(1, *sizes, generator=generator)}
    return None
