"""llm-compressor: GPTQ layer by layer, each calibrated with the rounded ones before it."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from peers.base import Compressed, Task, grid_bits, linears

PACKAGES = ["llmcompressor==0.14.0.1"]


def settings(model: str) -> dict[str, dict[str, Any]]:
    """GPTQ of 4, 3 and 2 bits in groups of 64, asymmetric, which was the better of its two kinds."""
    found: dict[str, dict[str, Any]] = {f"GPTQ W{bits} g64 asym": {"bits": bits} for bits in (4, 3, 2)}
    return found | {"GPTQ W4 g64 sym": {"bits": 4, "symmetric": True}, "GPTQ W3 g128 asym": {"bits": 3, "group": 128}}


def compress(task: Task, bits: int, group: int = 64, symmetric: bool = False) -> Compressed:
    """Run GPTQ in one shot; the weights in memory are the rounded ones."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    model = task.load()
    scheme = {
        "targets": ["Linear"],
        "weights": {
            "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group,
        },
    }  # fmt: skip
    # The pooler of an encoder is never reached, so it has nothing to be calibrated with.
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head", "re:.*pooler.*"])
    sequences = task.sequences()
    oneshot(
        model=model,
        recipe=recipe,
        dataset=DataLoader(sequences, batch_size=None),
        processor=task.tokenizer(),
        num_calibration_samples=len(sequences),
        max_seq_length=max(sequence["input_ids"].shape[1] for sequence in sequences),
    )
    made = Compressed(runtime=lambda batch: model(**batch))
    for name, layer in linears(model).items():
        if hasattr(layer, "weight_scale"):
            cost = grid_bits(layer.weight.shape, bits, group, 0 if symmetric else bits)
            made.add(f"{name}.weight", layer.weight, cost)
    return made
