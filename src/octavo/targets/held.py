"""Measurements of an artifact made for memory, on the model that runs from packed codes."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from octavo.artifact import Artifact
from octavo.calibration.objective import Objective, OfOutputs
from octavo.encoding.result import Result
from octavo.encoding.section import Section
from octavo.runtimes.packed import held_bytes, kernels_of
from octavo.runtimes.packed.speed import generates, greedy, interleaved
from octavo.sources.batches import run
from octavo.sources.sentences import split_name
from octavo.system.records import plain_json
from octavo.verification.loading import load
from octavo.verification.recorded import PackedFigures, PackedSpeed

_TOKENS = 16


def packed_figures(done: Result, artifact: Artifact) -> PackedFigures:
    """Memory, kernels, quality and speed of the packed model; only memory if there is no model to run."""
    opened, stated = done.opened, done.built.counted
    if opened.source.module is None and not opened.source.is_transformers:
        return PackedFigures(stated, held_bytes(load(artifact.path, packed=True)))
    packed = _loaded(done, artifact, packed=True)
    kernels = {name: len(sites) for name, sites in kernels_of(packed).items()}
    figures = PackedFigures(stated, held_bytes(packed), kernels)
    if not opened.measurable:
        return figures
    if opened.source.is_encoder and any(split_name(name)[0] for name in artifact.names()):
        note = "the layers after the transformer cannot run packed, so quality and speed were not measured"
        return replace(figures, note=note)
    figures = replace(figures, quality=float(done.run.judge(packed).mean()))
    dense = _loaded(done, artifact, packed=False).to(torch.bfloat16)
    try:
        speed = _speed(packed, dense, opened.held_data[0], opened.objective)
    except Exception as error:
        if isinstance(opened.objective, OfOutputs):
            raise
        # A user's loss need not support bfloat16, and was measured without it.
        note = f"not timed: the objective fails on the model in bfloat16: {type(error).__name__}: {error}"
        return replace(figures, note=note)
    return replace(figures, speed=speed, note=_slower(speed))


def _slower(speed: PackedSpeed) -> str:
    if speed.packed <= speed.dense:
        return ""
    times = speed.packed / speed.dense
    return f"running from packed codes is slower than bfloat16 dense here: {speed.what} takes {times:.2f} times as long"


def _loaded(done: Result, artifact: Artifact, *, packed: bool) -> nn.Module:
    module = done.opened.source.module
    if done.opened.source.is_transformers:
        return load(artifact.path, packed=packed)
    return load(artifact.path, into=deepcopy(module).eval(), packed=packed)  # type: ignore[union-attr]


def _speed(packed: nn.Module, dense: nn.Module, batch: Any, objective: Objective) -> PackedSpeed:
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
    return PackedSpeed(what, "s", seconds["packed"], seconds["dense"])


def section(found: PackedFigures) -> Section:
    """The report's section on the model that runs from packed codes."""
    kernels = ", ".join(f"{count} on {name}" for name, count in sorted(found.kernels.items()))
    text = f"Running from packed codes, the weights take {found.held:,} bytes of memory ({found.stated:,} were stated)."
    text += f" Matrices by kernel: {kernels}." if kernels else ""
    speed, notes = found.speed, (found.note,) if found.note else ()
    if speed is None:
        return Section("running", "In memory", text, notes=notes, figures=plain_json(found))
    rows = (("packed", 1e3 * speed.packed), ("dense bfloat16", 1e3 * speed.dense))
    return Section("running", "In memory", text, ("runs", f"ms for {speed.what}"), rows, notes, plain_json(found))
