"""What the report says of an artifact made for memory: measured on the model that runs from packed codes."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from octavo.artifact import Artifact
from octavo.artifact.writing import split_name
from octavo.calibration.objective import Objective, OfOutputs
from octavo.report.schema import PackedFigures, PackedSpeed
from octavo.runtimes.packed import held_bytes, kernels_of
from octavo.runtimes.packed.speed import generates, greedy, interleaved
from octavo.sources.batches import run
from octavo.verification.verifying import load

if TYPE_CHECKING:
    from octavo.pipeline import Compressed

_TOKENS = 16


def packed_figures(done: Compressed, artifact: Artifact) -> PackedFigures:
    """Bytes held, kernels, quality and speed of the packed model; bytes alone where there is no model to run."""
    job, stated = done.job, done.built.counted
    if job.source.module is None and not job.source.is_transformers:
        return PackedFigures(stated, held_bytes(load(artifact.path, packed=True)))
    packed = _loaded(done, artifact, packed=True)
    kernels = {name: len(sites) for name, sites in kernels_of(packed).items()}
    figures = PackedFigures(stated, held_bytes(packed), kernels)
    if not job.measurable:
        return figures
    if job.source.is_encoder and any(split_name(name)[0] for name in artifact.names()):
        note = "the layers behind the transformer do not run packed, so that quality and speed were not measured"
        return replace(figures, note=note)
    figures = replace(figures, quality=float(job.judge(packed).mean()))
    dense = _loaded(done, artifact, packed=False).to(torch.bfloat16)
    try:
        speed = _speed(packed, dense, job.held_data[0], job.objective)
    except Exception as error:
        if isinstance(job.objective, OfOutputs):
            raise
        # A loss of the user's own need not know bfloat16, and was measured without it.
        note = f"not timed: the objective fails on the model in bfloat16: {type(error).__name__}: {error}"
        return replace(figures, note=note)
    return replace(figures, speed=speed, note=_slower(speed))


def _slower(speed: PackedSpeed) -> str:
    if speed.packed is None or speed.dense is None or speed.packed <= speed.dense:
        return ""
    times = speed.packed / speed.dense
    return f"running from packed codes is slower than bfloat16 dense here: {speed.what} takes {times:.2f} times as long"


def _loaded(done: Compressed, artifact: Artifact, *, packed: bool) -> nn.Module:
    module = done.job.source.module
    if done.job.source.is_transformers:
        return load(artifact.path, packed=packed)
    return load(artifact.path, into=deepcopy(module).eval(), packed=packed)  # type: ignore[union-attr]


def _speed(packed: nn.Module, dense: nn.Module, batch: Any, objective: Objective) -> PackedSpeed:
    """Median seconds of both, of one token for models that write, else of one batch."""
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
    return PackedSpeed(what, "s", seconds["packed"], seconds["dense"])
