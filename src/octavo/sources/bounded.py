"""Models that are built from a stranger's configuration, stopped when they have far more parts than the files fill."""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from octavo.errors import ArtifactError

#: Parameters for every tensor of the files, and modules, in all models that are built on the way to one.
_PARAMETERS, _MODULES = 16, 64
#: What a model may have whatever its files hold.
_LEAST = 4096
#: Elements of parameters for every element in the files, and whatever these hold.
_ELEMENTS, _LEAST_ELEMENTS = 12, 1 << 24


@contextmanager
def bounded(tensors: int, elements: int) -> Iterator[None]:
    """Let modules that are built meanwhile, in this thread, have no more parts than files of so many tensors justify.

    Parameters
    ----------
    tensors, elements
        How many tensors the files hold, and how many numbers these have together.

    Raises
    ------
    ArtifactError
        Out of what builds them, once they have more.
    """
    thread = threading.get_ident()
    left = {
        "parameters": _LEAST + _PARAMETERS * tensors,
        "modules": _LEAST + _MODULES * tensors,
        "weights": _LEAST_ELEMENTS + _ELEMENTS * elements,
    }

    def count(kind: str, number: int) -> None:
        if threading.get_ident() == thread:
            left[kind] -= number
            if left[kind] < 0:
                raise ArtifactError(
                    f"the configuration asks for far more {kind} than {tensors} tensors of {elements} weights fill; it "
                    "was not written with them, copy both again"
                )

    def parameter(module: Any, name: str, part: Any) -> None:
        if part is not None:
            count("parameters", 1)
            count("weights", part.numel())

    def submodule(module: Any, name: str, part: Any) -> None:
        count("modules", 1)

    hooks = [
        register_module_parameter_registration_hook(parameter),
        register_module_module_registration_hook(submodule),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def bounded_by(shapes: Collection[tuple[int, ...]]) -> AbstractContextManager[None]:
    """:func:`bounded` by files that hold tensors of these shapes."""
    return bounded(len(shapes), sum(map(math.prod, shapes)))
