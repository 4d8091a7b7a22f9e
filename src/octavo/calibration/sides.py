"""Which mask applies to which part of a model: that of the encoder's tokens, of the decoder's, or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from octavo.calibration.outputs import OTHER_SENSES
from octavo.sources.batches import Batch, mask_of
from octavo.sources.model_kinds import is_paired

#: Names that models use for cross-attention, and for its layers that read the encoder's states.
_CROSS = ("cross", "encoder_attn", "EncDecAttention", "encoder_decoder")
_READING = ("k_proj", "v_proj", "k", "v", "key", "value", "kv_proj")


def sides_of(module: nn.Module | None) -> dict[nn.Module, str]:
    """``encoder``, ``decoder``, ``both`` or ``none`` for the modules to which the token mask may not apply.

    Modules that are left out read the tokens of the mask.
    """
    if module is None or getattr(module, "config", None) is None:
        return {}
    paired = is_paired(module)
    result: dict[nn.Module, str] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        parts = name.split(".")
        if any(word in part.lower() for part in parts for word in OTHER_SENSES):
            side = "none"
        elif not paired:
            continue
        elif "decoder" in parts:
            crossing = any(word in part for part in parts for word in _CROSS) and parts[-1] in _READING
            side = "encoder" if crossing else "decoder"
        else:
            side = "encoder" if "encoder" in parts else "both"
        # A table that both sides share has two names.
        result[child] = side if result.get(child, side) == side else "both"
    return result


@dataclass
class Masks:
    """The masks of a batch, each (sequences, tokens)."""

    tokens: Tensor | None = None
    decoder: Tensor | None = None

    @classmethod
    def of_batch(cls, batch: Batch) -> Masks:
        """Read the masks of a batch."""
        decoder = batch.get("decoder_attention_mask") if isinstance(batch, Mapping) else None
        return cls(mask_of(batch), decoder)

    def of(self, side: str) -> Tensor | None:
        """The mask for a module of that side, or None if no mask certainly applies."""
        if side in ("none", "both"):
            return None
        return self.decoder if side == "decoder" else self.tokens
