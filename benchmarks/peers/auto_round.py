"""AutoRound: rounding learned block by block with signed gradient descent."""

from __future__ import annotations

from typing import Any

from peers.base import Compressed, Task, grid_bits, linears

PACKAGES = ["auto-round==0.16.1"]


def settings(model: str) -> dict[str, dict[str, Any]]:
    """Its default of 200 iterations for small models, and the 50 of its light recipe for language models, which take hours else."""
    iterations = 200 if model in ("minilm", "decoder") else 50
    if model in ("whisper", "lite0"):
        return {f"W4 g64 iters={iterations}": {"bits": 4, "iterations": iterations}}
    return {f"W{bits} g64 iters={iterations}": {"bits": bits, "iterations": iterations} for bits in (4, 3, 2)}


def compress(task: Task, bits: int, iterations: int) -> Compressed:
    """Round with AutoRound; its weights are read before it packs them."""
    from auto_round import AutoRound

    data = task.padded()
    # It takes sequences of one length only, and masks what the tokenizer pads with.
    rows = [{name: tensor[i : i + 1] for name, tensor in data.items()} for i in range(len(next(iter(data.values()))))]
    tokens = [tensor.shape[1] for name, tensor in data.items() if name.endswith("input_ids")]
    rounder = AutoRound(
        task.load(),
        tokenizer=task.tokenizer() if tokens else None,
        scheme=f"W{bits}A16",
        group_size=64,
        sym=True,
        iters=iterations,
        nsamples=len(rows),
        seqlen=max(tokens, default=1),
        dataset=rows,
        device_map="cpu",
        enable_torch_compile=False,
    )
    model, _ = rounder.quantize()
    made = Compressed()
    for name, layer in linears(model).items():
        if getattr(layer, "scale", None) is not None:
            made.add(f"{name}.weight", layer.weight, grid_bits(layer.weight.shape, bits, 64))
    return made
