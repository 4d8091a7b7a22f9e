"""One judge for all tools: what weights cost in bytes, and what they do to the model's outputs on held-out text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from common import CACHE, brown, windows
from models import model_folder
from torch import Tensor, nn

from octavo.calibration.objective import Cosine
from octavo.sources.tokens import text_batches
from octavo.system.matmul import fast_matmul

#: Positions whose logits are in memory at a time.
_CHUNK = 256


class Judge:
    """A model as it came, and how far a changed one is from it.

    Parameters
    ----------
    name
        Short name of the model.
    """

    def __init__(self, name: str) -> None:
        from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

        self.name, self.folder = name, model_folder(name)
        self.encoder = name == "minilm"
        kind = AutoModel if self.encoder else AutoModelForCausalLM
        self.model: nn.Module = kind.from_pretrained(self.folder, dtype=torch.float32).eval()
        #: Every distinct tensor once: a tied head is its embedding.
        self.original: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in self.model.named_parameters()
        }
        self.weights = sum(tensor.numel() for tensor in self.original.values())
        self.embedding = next(
            name for name, parameter in self.model.named_parameters()
            if parameter is self.model.get_input_embeddings().weight
        )  # fmt: skip
        if self.encoder:
            self.calibration: Any = brown()[0]
            self.batches = text_batches(self.folder, brown()[1])
            self.reference = Cosine().reference(self.model, self.batches)
        else:
            self.calibration, self.test = windows(AutoTokenizer.from_pretrained(self.folder))
            self.reference = [self._states(window) for window in self.test]
            self.head = self.model.get_output_embeddings().weight.detach().clone()

    @property
    def metric(self) -> str:
        """What quality is; lower is better."""
        return "1 - cosine" if self.encoder else "mean KL"

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
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name] if name in weights else self.original[name].half())
        return self.measure(self.model)

    @fast_matmul()
    @torch.inference_mode()
    def measure(self, model: nn.Module) -> dict[str, float]:
        """Quality of a model: 1 - cosine of sentence vectors, or mean KL of the next token and perplexity."""
        if self.encoder:
            return {"quality": float(Cosine().measure(model, self.batches, self.reference).mean())}
        divergence, loss = 0.0, 0.0
        head = model.get_output_embeddings()
        for window, before in zip(self.test, self.reference, strict=True):
            after = model.model(input_ids=window[None], use_cache=False).last_hidden_state[0]
            targets = window[1:]
            for at in range(0, len(window), _CHUNK):
                old = nn.functional.linear(before[at : at + _CHUNK], self.head).log_softmax(-1)
                new = head(after[at : at + _CHUNK]).log_softmax(-1)
                divergence += float(nn.functional.kl_div(new, old, reduction="sum", log_target=True))
                wanted = targets[at : at + _CHUNK]
                loss -= float(new[: len(wanted)].gather(1, wanted[:, None]).sum())
        count, length = self.test.shape
        return {
            "quality": divergence / (count * length),
            "perplexity": math.exp(min(loss / (count * (length - 1)), 700)),
        }

    @fast_matmul()
    @torch.inference_mode()
    def _states(self, window: Tensor) -> Tensor:
        return self.model.model(input_ids=window[None], use_cache=False).last_hidden_state[0]

    def inputs(self) -> dict[str, Tensor]:
        """The calibration text as every tool gets it."""
        from transformers import AutoTokenizer

        if not self.encoder:
            return {"input_ids": self.calibration, "attention_mask": torch.ones_like(self.calibration)}
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        padded = tokenizer(self.calibration, padding=True, return_tensors="pt")
        return {name: padded[name].contiguous() for name in ("input_ids", "attention_mask")}


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
    import re

    return CACHE / "bench" / model / tool / re.sub(r"[^A-Za-z0-9.=]+", "-", setting)
