"""Import hooks that extend other libraries, so that their loaders understand artifacts.

``import octavo`` imports neither these libraries nor the extensions: both wait until the library is imported.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

#: Maps modules to our module that is imported after them, and to its optional function to call.
HOOKS = {
    "transformers.configuration_utils": ("octavo.integrations.trust", "guard_configurations"),
    "transformers.quantizers.auto": ("octavo.integrations.quantizer", None),
    "sentence_transformers.base.model": ("octavo.integrations.trust", "guard_encoders"),
    "sentence_transformers.base.modules.module": ("octavo.integrations.members", "decode_members"),
}
#: Attribute set on modules that were extended.
_MARK = "__octavo__"
_LOCK = threading.RLock()


def register() -> None:
    """Extend the modules of :data:`HOOKS`: those already imported now, the others once they are imported."""
    with _LOCK:
        if not any(isinstance(finder, _Hooks) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Hooks())
    for name in HOOKS:
        if name in sys.modules:
            # This waits if another thread is importing it.
            _act(importlib.import_module(name))


def _act(module: ModuleType) -> None:
    own, function = HOOKS[module.__name__]
    added = importlib.import_module(own)
    with _LOCK:
        if not hasattr(module, _MARK):
            setattr(module, _MARK, True)
            if function is not None:
                getattr(added, function)(module)


class _Hooks(MetaPathFinder):
    """Finds the modules of :data:`HOOKS` with the usual finders, and extends them after they were executed."""

    def __init__(self) -> None:
        self._asking = threading.local()

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in HOOKS or getattr(self._asking, "now", False):
            return None
        self._asking.now = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking.now = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Acting(spec.loader)
        return spec


class _Acting(Loader):
    """A loader that delegates to the usual one and extends the loaded module."""

    def __init__(self, usual: Loader) -> None:
        self.usual = usual

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.usual.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Code that inspects the module's source must find the usual loader.
        module.__loader__ = self.usual
        if module.__spec__ is not None:
            module.__spec__.loader = self.usual
        vars(module).pop(_MARK, None)
        self.usual.exec_module(module)
        _act(module)
