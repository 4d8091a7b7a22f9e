"""Loops that PyTorch has no operation for, compiled by numba where that is installed (the extra ``numba``)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """The function as machine code that does not hold the interpreter's lock; None where numba is not installed.

    The code is kept beside the module, or in the user's cache, so that it is compiled once.
    """
    try:
        from numba import njit
    except ImportError:
        return None
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # there is no folder that it could be kept in
        return njit(nogil=True)(function)
