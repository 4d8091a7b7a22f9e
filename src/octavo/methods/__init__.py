"""Algorithms that find forms for sites: one file a method, registered by decorator."""

from octavo.methods.base import METHODS, Method, Setting, method
from octavo.methods.selecting import (
    DATA_FREE,
    ORDINARY,
    Usable,
    dense_method,
    dense_names,
    methods,
    of_runtime,
    plain_method,
    select_methods,
)
from octavo.methods.spelling import get_method

__all__ = [
    "DATA_FREE",
    "METHODS",
    "ORDINARY",
    "Method",
    "Setting",
    "Usable",
    "dense_method",
    "dense_names",
    "get_method",
    "method",
    "methods",
    "of_runtime",
    "plain_method",
    "select_methods",
]  # fmt: skip
