"""Loops without a PyTorch operation, compiled by numba if it is installed (the extra ``numba``)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """The function compiled to release the interpreter lock; None if numba is not installed.

    The code is cached next to the module or in the user's cache, so that it is compiled once.
    """
    try:
        from numba import njit
    except ImportError:
        return None
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # there is no writable cache folder
        return njit(nogil=True)(function)
