"""llm-compressor: GPTQ layer by layer, each calibrated with the rounded ones before it."""

from __future__ import annotations

from typing import Any

from models import ENCODER
from torch import nn
from torch.utils.data import DataLoader

from peers.base import Compressed, Task, convolutions, grid_bits, linears

PACKAGES = ["llmcompressor==0.14.0.1"]


def settings(model: str) -> dict[str, dict[str, Any]]:
    """GPTQ of 4 and 3 bits in groups of 64, asymmetric, which was the better of its two kinds."""
    return {f"GPTQ W{bits} g64 asym": {"bits": bits} for bits in (4, 3)}


def compress(task: Task, bits: int) -> Compressed:
    """Run GPTQ in one shot; the weights in memory are the rounded ones."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    model = task.load()
    scheme = {
        "targets": ["Linear", "Conv2d"],
        "weights": {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": 64},
    }
    # The pooler of an encoder is never reached, so it has nothing to be calibrated with.
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head", "proj_out", "re:.*pooler.*"])
    sequences = task.sequences()
    options: dict[str, Any] = {}
    if task.language or task.model == ENCODER:
        options = {"processor": task.tokenizer(), "max_seq_length": max(sequence["input_ids"].shape[1] for sequence in sequences)}  # fmt: skip
    else:
        # What has no layers of one kind that follow each other is calibrated as a whole. It asks for a processor, with
        # which batches that are made already have nothing to do.
        options = {"pipeline": "basic", "processor": nn.Identity()}
        if not hasattr(model, "save_pretrained"):
            # It wraps this for later, but nothing is saved here.
            model.save_pretrained = model.state_dict
    oneshot(
        model=model,
        recipe=recipe,
        dataset=DataLoader(sequences, batch_size=None),
        num_calibration_samples=len(sequences),
        **options,
    )
    made = Compressed(runtime=lambda batch: model(**batch))
    for name, layer in (linears(model) | convolutions(model)).items():
        if hasattr(layer, "weight_scale"):
            made.add(f"{name}.weight", layer.weight, grid_bits(layer.weight.shape, bits, 64, bits))
    return made
