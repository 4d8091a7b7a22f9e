"""The result of a module: a tree of tensors, some with a mask that separates positions from padding."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from octavo.sources.model_kinds import is_paired, takes_tokens

#: Caches for the next call, and outputs that only show internals.
_NOT_COMPARED = {
    "past_key_values", "encoder_past_key_values", "decoder_past_key_values", "cache_params", "state", "mems",
    "hidden_states", "encoder_hidden_states", "decoder_hidden_states",
}  # fmt: skip
#: Outputs of image or sound parts, to which the token mask does not apply.
OTHER_SENSES = ("vision", "visual", "image", "audio", "speech", "pixel")
#: The label of a position that does not count.
_IGNORED = -100


def part(result: Any, name: str) -> Any:
    """A named part of a module's result, or None."""
    if isinstance(result, Tensor):
        return None
    return result.get(name) if isinstance(result, Mapping) else getattr(result, name, None)


def parts(result: Any) -> dict[str, Any]:
    """All parts by name; those of a tuple or list by number."""
    if isinstance(result, Mapping):
        return {str(name): value for name, value in result.items()}
    if isinstance(result, tuple | list):
        names = getattr(result, "_fields", range(len(result)))
        return {str(name): value for name, value in zip(names, result, strict=True)}
    if dataclasses.is_dataclass(result):
        return {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    return dict(vars(result)) if isinstance(result, SimpleNamespace) else {}


def leaves(result: Any, examples: int) -> dict[str, Tensor]:
    """The floating tensors with one entry per example, by path; caches are left out."""
    return {
        name: tensor
        for name, tensor in _walk("", result)
        if tensor.is_floating_point() and tensor.ndim and len(tensor) == examples and tensor.numel()
    }


def _walk(path: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
        return
    for name, inner in parts(value).items():
        if name not in _NOT_COMPARED:
            yield from _walk(f"{path}.{name}" if path else name, inner)


def described(result: Any) -> str:
    """A result's type and names, for messages."""
    names = [name for name, value in parts(result).items() if value is not None]
    return f"{type(result).__name__} ({', '.join(names)})" if names else type(result).__name__


def mask_for(name: str, tensor: Tensor, module: nn.Module, batch: Any) -> Tensor | None:
    """The (examples, positions) mask of an output, if the batch has one that certainly belongs to it.

    An encoder's mask does not apply to decoder positions, nor a mask of samples to frames, even if the lengths agree by
    chance.

    Parameters
    ----------
    name
        Path of the output in the module's result; empty for a bare tensor.
    """
    if not isinstance(batch, Mapping) or any(word in name for word in OTHER_SENSES):
        return None
    mask: Any = None
    if is_paired(module, batch) and not name.startswith("encoder"):
        mask, labels = batch.get("decoder_attention_mask"), batch.get("labels")
        if mask is None and isinstance(labels, Tensor):
            mask = labels != _IGNORED
    elif takes_tokens(module):
        mask = batch.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape == tensor.shape[:2] else None
