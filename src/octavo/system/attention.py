"""The faster of PyTorch's two ways to compute attention over short sequences on a CPU.

PyTorch calls a fused kernel that keeps no table of scores. On a CPU it handles short sequences badly, most of all
backward. Longer sequences need too much memory for their scores.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

#: The longest sequence, in tokens, for which plain products are used.
SHORT = 256
_lock = threading.Lock()
_state: dict[str, Any] = {"users": 0, "before": True}


@contextmanager
def attention_for(length: int | None) -> Iterator[None]:
    """A context in which attention is computed in the way that suits sequences of at most ``length`` tokens.

    None stands for an unknown length, for which PyTorch chooses. The switch is global to the process: it stays until
    the last thread that requested plain products is done.
    """
    if length is None or length > SHORT:
        yield
        return
    _fuse(1)
    try:
        yield
    finally:
        _fuse(-1)


def _fuse(change: int) -> None:
    with _lock:
        # The switch is named after CUDA, and the kernel for CPUs obeys it too.
        switch = torch.backends.cuda
        if not _state["users"]:
            _state["before"] = switch.flash_sdp_enabled()
        _state["users"] += change
        switch.enable_flash_sdp(_state["before"] and not _state["users"])
