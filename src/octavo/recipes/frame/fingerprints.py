"""Fingerprints of code: what made a result or a base, module by module."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

#: Rooms whose code makes figures. What lies below them, such as forms and coders, is held to fixed bytes by tests.
ROOMS = ("recipes", "methods", "cuts", "training", "architectures", "calibration")


def code_of(*made: Callable[..., Any]) -> dict[str, str]:
    """Digests of the modules that define these functions, and of those of :data:`ROOMS` that they import, by name.

    Imports are followed to the module that defines the imported name. So a package that only collects names adds none.
    """
    found: dict[str, str] = {}
    waiting = [function.__module__ for function in made]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name], used = _read(name)
            waiting += used
    return dict(sorted(found.items()))


def joined(digests: dict[str, str]) -> str:
    """One digest of several."""
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()[:16]


@functools.cache
def _read(name: str) -> tuple[str, tuple[str, ...]]:
    """The digest of a module's code, and the modules that it uses."""
    module = importlib.import_module(name)
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):
        # Code that was typed in has no file.
        return "", ()
    tree = ast.parse(source)
    return _digest(source, tree), tuple(sorted(_used(module, tree)))


def _digest(source: str, tree: ast.Module) -> str:
    """Imports, docstrings, lines of comment and white space do not count."""
    left_out: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            left_out.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = [line for number, line in enumerate(source.splitlines(), 1) if number not in left_out]
    code = "".join("".join(line.split()) for line in lines if not line.lstrip().startswith("#"))
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def _used(module: ModuleType, tree: ast.Module) -> set[str]:
    found = set()
    for node in tree.body:
        if not isinstance(node, ast.ImportFrom) or node.level or not (node.module or "").startswith("octavo."):
            continue
        for alias in node.names:
            value = getattr(module, alias.asname or alias.name, None)
            owner = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            # A constant knows no module: it is in the one that is named.
            found.add(owner if isinstance(owner, str) and owner in sys.modules else str(node.module))
    return {name for name in found if name.split(".")[:1] == ["octavo"] and name.split(".")[1:2][0] in ROOMS}
