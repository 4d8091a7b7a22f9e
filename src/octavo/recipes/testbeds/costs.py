"""What a call costs: processor time on one thread, and what a backward pass holds in memory."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def milliseconds(calls: Mapping[str, Callable[[], Any]], rounds: int = 3) -> dict[str, float]:
    """Median time of every call, in alternating rounds after a warm-up round, on one thread.

    Processor time is measured, which on one thread equals the elapsed time if nothing else is running.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(rounds + 1):
            for name, call in calls.items():
                started = time.process_time()
                call()
                found[name].append(1e3 * (time.process_time() - started))
    finally:
        torch.set_num_threads(threads)
    return {name: statistics.median(values[1:]) for name, values in found.items()}


def held(model: nn.Module, call: Callable[[], Any]) -> int:
    """Bytes of everything that a call saves for its backward pass, the model's parameters apart."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(found.values())


def crossing(places: Sequence[float], ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The place from which ``ours`` stays above ``theirs``, interpolated on logarithms.

    It is the first place if ``ours`` is always above, and the last one if it is below there.
    """
    ratios = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
    below = [at for at, ratio in enumerate(ratios) if ratio < 0]
    if not below or below[-1] == len(places) - 1:
        return places[-1 if below else 0]
    at = below[-1]
    return float(places[at] * (places[at + 1] / places[at]) ** (ratios[at] / (ratios[at] - ratios[at + 1])))
