"""Timing models alternately, so that the machine's load affects all of them equally."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int = 5,
    patience: float = math.inf,
    of: Callable[[Sequence[float]], float] = statistics.median,
) -> dict[str, float]:
    """Median seconds of every call, in alternating rounds after a warm-up round; ``of=min`` for the minimum.

    The minimum is closest to the time of the call, since other load only adds to it. No round starts after ``patience``
    seconds; if only the warm-up round ran, it counts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    begun = time.perf_counter()
    with torch.inference_mode():
        for turn in range(rounds + 1):
            if turn and time.perf_counter() - begun > patience:
                break
            for name, call in calls.items():
                started = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - started)
    return {name: of(values[1:] or values) for name, values in seconds.items()}


def generates(model: nn.Module) -> bool:
    """Whether a model generates tokens one by one."""
    return bool(getattr(model, "can_generate", lambda: False)())


def greedy(model: Any, tokens: int, prompt: int = 16) -> Callable[[], Any]:
    """A call that generates the given number of tokens at batch 1, each from the previous one and the cache."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (1, prompt), generator=torch.Generator().manual_seed(0))

    def call() -> None:
        cache, step = None, ids
        for _ in range(tokens):
            out = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache, step = out.past_key_values, out.logits[:, -1:].argmax(-1)

    return call
