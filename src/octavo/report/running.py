"""The report on an artifact made for memory, measured on the model running from packed codes."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from octavo.artifact import Artifact
from octavo.artifact.writing import split_name
from octavo.calibration.objective import Objective, OfOutputs
from octavo.runtimes.packed import held_bytes, kernels_of
from octavo.runtimes.packed.speed import generates, greedy, interleaved
from octavo.sources.batches import run
from octavo.verification.verifying import load

if TYPE_CHECKING:
    from octavo.pipeline import Compressed

_TOKENS = 16


def running_data(done: Compressed, artifact: Artifact) -> dict[str, Any]:
    """Memory, kernels, quality and speed of the packed model; only memory if there is no model to run."""
    job, stated = done.job, done.built.counted
    result: dict[str, Any] = {"stated": stated, "held": None, "kernels": {}, "quality": None, "speed": None, "note": ""}
    if job.source.module is None and not job.source.is_transformers:
        result["held"] = held_bytes(load(artifact.path, packed=True))
        return result
    packed = _loaded(done, artifact, packed=True)
    result["held"] = held_bytes(packed)
    result["kernels"] = {name: len(sites) for name, sites in kernels_of(packed).items()}
    if not job.measurable:
        return result
    if job.source.is_encoder and any(split_name(name)[0] for name in artifact.names()):
        result["note"] = "the layers after the transformer cannot run packed, so quality and speed were not measured"
        return result
    result["quality"] = float(job.judge(packed).mean())
    dense = _loaded(done, artifact, packed=False).to(torch.bfloat16)
    try:
        result["speed"] = speed = _speed(packed, dense, job.held_data[0], job.objective)
    except Exception as error:
        if isinstance(job.objective, OfOutputs):
            raise
        # A user's loss need not support bfloat16, and was measured without it.
        result["note"] = f"not timed: the objective fails on the model in bfloat16: {type(error).__name__}: {error}"
        return result
    if speed["packed"] > speed["dense"]:
        result["note"] = (
            f"running from packed codes is slower than bfloat16 dense here: {speed['what']} takes "
            f"{speed['packed'] / speed['dense']:.2f} times as long"
        )
    return result


def _loaded(done: Compressed, artifact: Artifact, *, packed: bool) -> nn.Module:
    module = done.job.source.module
    if done.job.source.is_transformers:
        return load(artifact.path, packed=packed)
    return load(artifact.path, into=deepcopy(module).eval(), packed=packed)  # type: ignore[union-attr]


def _speed(packed: nn.Module, dense: nn.Module, batch: Any, objective: Objective) -> dict[str, Any]:
    """Median seconds of both models: per token for generative models, else per batch."""
    if generates(packed):
        seconds = interleaved({"packed": greedy(packed, _TOKENS), "dense": greedy(dense, _TOKENS)})
        seconds = {name: value / _TOKENS for name, value in seconds.items()}
        what = "a token at batch 1"
    else:
        narrow = torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda tensor: tensor.bfloat16() if tensor.is_floating_point() else tensor, batch
        )
        call_on = run if isinstance(objective, OfOutputs) else objective.outputs
        seconds = interleaved({"packed": lambda: call_on(packed, batch), "dense": lambda: call_on(dense, narrow)})
        what = "a batch of calibration data"
    return {"what": what, "unit": "s", **seconds}
