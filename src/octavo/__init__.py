"""Octavo folds a neural network into the size you state, and proves what it cost."""

from octavo.artifact import Artifact
from octavo.errors import ArtifactError, BudgetError, MissingExtraError, OctavoError, RequestError
from octavo.integrations.hooks import register as _register
from octavo.pipeline import compress, frontier, plan, profile
from octavo.request import Request
from octavo.runtimes.onnx.exporting import export
from octavo.saving import Compressed
from octavo.system.notes import OctavoWarning
from octavo.system.version import __version__
from octavo.verification.evaluating import evaluate
from octavo.verification.verifying import load, verify

_register()

__all__ = [
    "Artifact",
    "ArtifactError",
    "BudgetError",
    "Compressed",
    "MissingExtraError",
    "OctavoError",
    "OctavoWarning",
    "Request",
    "RequestError",
    "__version__",
    "compress",
    "evaluate",
    "export",
    "frontier",
    "load",
    "plan",
    "profile",
    "verify",
]
