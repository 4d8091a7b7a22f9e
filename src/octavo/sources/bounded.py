"""Limits on models built from untrusted configurations: they may not have far more parts than the files fill."""

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

#: Limits on parameters and on modules per tensor of the files, summed over all models built meanwhile.
_PARAMETERS, _MODULES = 16, 64
#: Numbers allowed regardless of the files.
_LEAST = 4096
#: Limit on parameter elements per element in the files, and the number allowed regardless.
_ELEMENTS, _LEAST_ELEMENTS = 12, 1 << 24


@contextmanager
def bounded(tensors: int, elements: int) -> Iterator[None]:
    """A context that limits the parts of modules built in this thread to what the files justify.

    Parameters
    ----------
    tensors, elements
        Number of tensors in the files, and their total number of elements.

    Raises
    ------
    ArtifactError
        Raised inside the constructor once the limit is exceeded.
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
                    f"the configuration asks for far more {kind} than {tensors} tensors of {elements} weights can "
                    "fill; they do not belong together, so copy both again"
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
