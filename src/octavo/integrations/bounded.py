"""Models that are built from a stranger's configuration, stopped when they have far more parts than the files fill."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def bounded(tensors: int) -> Iterator[None]:
    """Let modules that are built meanwhile, in this thread, have no more parts than files of so many tensors justify.

    Raises
    ------
    ArtifactError
        Out of what builds them, once they have more.
    """
    thread = threading.get_ident()
    left = {"parameters": _LEAST + _PARAMETERS * tensors, "modules": _LEAST + _MODULES * tensors}

    def count(kind: str) -> Any:
        def seen(module: Any, name: str, part: Any) -> None:
            if threading.get_ident() != thread or part is None:
                return
            left[kind] -= 1
            if left[kind] < 0:
                raise ArtifactError(
                    f"the configuration asks for far more {kind} than the artifact's {tensors} tensors fill; "
                    "it was not written with them, copy the artifact again"
                )

        return seen

    hooks = [
        register_module_parameter_registration_hook(count("parameters")),
        register_module_module_registration_hook(count("modules")),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
