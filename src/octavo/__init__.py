"""Octavo folds a neural network into the size you state, and proves what it cost.

The public names are imported when they are first asked for, so that ``import octavo`` takes no time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from octavo.errors import ArtifactError, BudgetError, MissingExtraError, OctavoError, RequestError
from octavo.integrations.hooks import register as _register
from octavo.system.notes import OctavoWarning
from octavo.system.version import __version__ as __version__

if TYPE_CHECKING:
    from octavo.artifact import Artifact
    from octavo.flows import updates as updates
    from octavo.flows.deltas.merging import merge
    from octavo.flows.deltas.switching import Deltas
    from octavo.pipeline import compress, frontier, plan, profile
    from octavo.request import Request
    from octavo.runtimes.onnx.exporting import export
    from octavo.saving import Compressed
    from octavo.storing import save
    from octavo.verification.evaluating import evaluate
    from octavo.verification.loading import load
    from octavo.verification.verifying import verify

__all__ = [
    "Artifact",
    "ArtifactError",
    "BudgetError",
    "Compressed",
    "Deltas",
    "MissingExtraError",
    "OctavoError",
    "OctavoWarning",
    "Request",
    "RequestError",
    "compress",
    "evaluate",
    "export",
    "frontier",
    "load",
    "merge",
    "plan",
    "profile",
    "save",
    "verify",
]
#: Where the names are that the block above shows to type checkers alone.
_HOMES = {
    "Artifact": "octavo.artifact",
    "Compressed": "octavo.saving",
    "Deltas": "octavo.flows.deltas.switching",
    "Request": "octavo.request",
    "compress": "octavo.pipeline",
    "evaluate": "octavo.verification.evaluating",
    "export": "octavo.runtimes.onnx.exporting",
    "frontier": "octavo.pipeline",
    "load": "octavo.verification.loading",
    "merge": "octavo.flows.deltas.merging",
    "plan": "octavo.pipeline",
    "profile": "octavo.pipeline",
    "save": "octavo.storing",
    "updates": "octavo.flows",
    "verify": "octavo.verification.verifying",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    # From now on it is found without this function.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_register()
