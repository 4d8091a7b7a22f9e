"""AutoRound: rounding learned block by block with signed gradient descent."""

from __future__ import annotations

from typing import Any

from peers.base import Compressed, Task, grid_bits, linears

PACKAGES = ["auto-round==0.16.1"]


def settings(model: str) -> dict[str, dict[str, Any]]:
    """Its default of 200 iterations for the encoder, and the 50 of its light recipe for language models, which take hours else."""
    iterations = 200 if model == "minilm" else 50
    found = {f"W{bits} g64 iters={iterations}": {"bits": bits, "iterations": iterations} for bits in (3, 2, 4)}
    if model == "minilm":
        found["W3 g128 iters=200"] = {"bits": 3, "group": 128}
        found["W2 g64 asym iters=200"] = {"bits": 2, "symmetric": False}
        found["W2 g64 iters=200 alg_ext"] = {"bits": 2, "extended": True}
        found["W2 g32 iters=200"] = {"bits": 2, "group": 32}
    return found


def compress(
    task: Task, bits: int, iterations: int = 200, group: int = 64, symmetric: bool = True, extended: bool = False
) -> Compressed:
    """Round with AutoRound; its weights are read before it packs them."""
    from auto_round import AutoRound

    data = task.padded()
    # It takes sequences of one length only, and masks what the tokenizer pads with.
    rows = [{name: tensor[i : i + 1] for name, tensor in data.items()} for i in range(len(data["input_ids"]))]
    rounder = AutoRound(
        task.load(),
        tokenizer=task.tokenizer(),
        scheme=f"W{bits}A16",
        group_size=group,
        sym=symmetric,
        iters=iterations,
        nsamples=len(rows),
        seqlen=data["input_ids"].shape[1],
        dataset=rows,
        device_map="cpu",
        enable_torch_compile=False,
        enable_alg_ext=extended,
    )
    model, _ = rounder.quantize()
    made = Compressed()
    for name, layer in linears(model).items():
        if getattr(layer, "scale", None) is not None:
            made.add(
                f"{name}.weight", layer.weight, grid_bits(layer.weight.shape, bits, group, 0 if symmetric else bits)
            )
    return made
