"""The time of a forward pass and of loading, before and after."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from octavo.artifact import Artifact
from octavo.calibration.inmemory import replaced
from octavo.calibration.objective import OfOutputs
from octavo.encoding.result import Result
from octavo.integrations.transformers import load_as_users_do
from octavo.report.schema import (
    Latency,
)
from octavo.runtimes.packed.speed import interleaved
from octavo.sources.batches import run
from octavo.sources.sentences import transformer_folder
from octavo.system.raw import Lazily

_PAIRS = 7
#: Seconds after which no further round is timed, by preset.
_PATIENCE = {"fast": 0.4}
_USUAL_PATIENCE = 2.0


def latency_of(done: Result, artifact: Artifact) -> Latency | None:
    """Latency of a forward pass before and after, interleaved in one run so that the machine's load cancels."""
    opened = done.opened
    if opened.source.module is None or opened.source.is_skeleton or not opened.held_data:
        return None
    module, batch = opened.source.module, opened.held_data[0]
    original = opened.source.original.module or module
    weights = opened.source.placed(Lazily({name: partial(artifact.stored, name) for name in artifact.names()}))

    # A user's objective may use parts of a batch that the module does not take.
    call_on = run if isinstance(opened.objective, OfOutputs) else opened.objective.outputs

    def pass_of(module: nn.Module, tensors: Mapping[str, Tensor]) -> Callable[[], Any]:
        def call() -> None:
            with replaced(module, tensors):
                call_on(module, batch)

        return call

    both = {"original": pass_of(original, {}), "artifact": pass_of(module, weights)}
    patience = _PATIENCE.get(opened.request.preset, _USUAL_PATIENCE)
    seconds = interleaved(both, _PAIRS, patience)
    result = Latency(
        original=1000 * seconds["original"],
        artifact=1000 * seconds["artifact"],
        note="median of interleaved passes of one batch; weights are decoded at load, both run dense",
    )
    if opened.source.is_transformers and opened.source.path is not None and opened.source.path.is_dir():
        source, written = (transformer_folder(path) for path in (opened.source.path, artifact.path))
        # Reading the original must touch its pages too, since a mapped file is only loaded when read.
        loads = {
            "load_original": lambda: _touch(load_as_users_do(source).model),
            "load_artifact": lambda: _touch(load_as_users_do(written).model),
        }
        seconds = interleaved(loads, 3, patience)
        result = replace(
            result,
            load_original=1000 * seconds["load_original"],
            load_artifact=1000 * seconds["load_artifact"],
        )
    return result


def _touch(module: nn.Module) -> float:
    return float(sum(parameter.detach().sum() for parameter in module.parameters()))
