"""Faster matrix products: the better of PyTorch's two libraries on a CPU, and bfloat16 where that is exact enough.

By default PyTorch calls MKL, which reaches less than half of the possible speed on CPUs that are not Intel's. oneDNN,
also part of PyTorch, has fast kernels for all CPUs (2.2x on an AMD EPYC with AVX-512). But PyTorch uses it only where
bfloat16 arithmetic is permitted. On hardware without fast bfloat16, oneDNN still computes in float32. This is tested at
run time, and the permission is given only if no precision is lost.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

#: Relative error of a product in float32 is near 4e-7, in bfloat16 near 2e-3.
_FLOAT32 = 2e-6
_SIDE = 256
#: Blocks of columns of a Gram matrix, and how wide they are at least.
_BLOCKS, _NARROW = 6, 64
_lock = threading.Lock()
_state: dict[str, Any] = {"users": 0, "before": "none"}


@contextmanager
def fast_matmul() -> Iterator[None]:
    """A context or decorator in which float32 matrix products use the faster library if it is as exact.

    The switch is global to the process: it stays on until the last thread that requested it is done.
    """
    if not _as_exact():
        yield
        return
    _permit(1)
    try:
        yield
    finally:
        _permit(-1)


def coarse_matmul(device: str = "cpu", *, wanted: bool = True) -> AbstractContextManager[Any]:
    """A context of autocast to bfloat16 on a type of device that multiplies it natively; elsewhere it changes nothing.

    Products are twice as fast on a CPU with AVX-512 BF16 (measured on an AMD EPYC). Weights are not cached, since
    callers exchange them.
    """
    if not wanted or not multiplies_bfloat16(device):
        return nullcontext()
    return torch.autocast(device, torch.bfloat16, cache_enabled=False)


def gram(rows: Tensor) -> Tensor:
    """``rows.t() @ rows`` of (N, columns).

    Blocks of columns are multiplied with those from their own on, and the rest is mirrored. That takes 0.6 of the
    arithmetic and of the time.
    """
    columns = rows.shape[1]
    found, block = rows.new_empty(columns, columns), max(_NARROW, -(-columns // _BLOCKS))
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        found[start:stop, start:] = rows[:, start:stop].t() @ rows[:, start:]
        found[stop:, start:stop] = found[start:stop, stop:].t()
    return found


def exact_matmul(device: str = "cpu") -> AbstractContextManager[Any]:
    """A context without autocast, inside of :func:`coarse_matmul`."""
    return torch.autocast(device, enabled=False) if multiplies_bfloat16(device) else nullcontext()


@cache
def multiplies_bfloat16(device: str) -> bool:
    """Whether a type of device multiplies bfloat16 natively."""
    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    # Older versions of PyTorch do not say it.
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return device == "cpu" and any(found.get(unit, False) for unit in ("avx512_bf16", "amx_bf16"))


def _permit(change: int) -> None:
    with _lock:
        setting = _setting()
        if not _state["users"]:
            _state["before"] = setting.fp32_precision
        _state["users"] += change
        setting.fp32_precision = "bf16" if _state["users"] else _state["before"]


def _as_exact() -> bool:
    with _lock:
        return _tried()


@cache
def _tried() -> bool:
    """Whether float32 products stay float32 where bfloat16 is permitted, on this machine."""
    setting = _setting()
    if setting is None or not torch.backends.mkldnn.is_available():
        return False
    before = setting.fp32_precision
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(_SIDE, _SIDE, generator=generator) for _ in range(2))
    wanted = left.double() @ right.double()
    setting.fp32_precision = "bf16"
    try:
        found = left @ right
    finally:
        setting.fp32_precision = before
    return float((found - wanted).norm() / wanted.norm()) < _FLOAT32


def _setting() -> Any:
    """PyTorch's switch, which versions before 2.9 do not have."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    return matmul if hasattr(matmul, "fp32_precision") else None
