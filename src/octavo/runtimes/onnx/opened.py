"""Opening an artifact or a model folder with the form of every site."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from octavo.artifact import MANIFEST, Artifact
from octavo.artifact.configuration import CONFIG
from octavo.calibration import inputs
from octavo.errors import RequestError
from octavo.forms import Dense, Form
from octavo.integrations.transformers import load_model
from octavo.integrations.trust import trusted
from octavo.runtimes.onnx.given import check_exportable
from octavo.runtimes.onnx.small import packed_bytes
from octavo.sources.files import from_path
from octavo.sources.loading import load_transformer
from octavo.sources.model_classes import is_known
from octavo.sources.sites import Layout
from octavo.sources.skeletons import bind
from octavo.sources.source import Source
from octavo.system.paths import checked


@dataclass
class OpenedModel:
    """A source or an artifact, with the form of every site."""

    source: Source
    forms: dict[str, Form]
    artifact: Artifact | None = None

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype to which decoded weights of an artifact are rounded, by site."""
        return {} if self.artifact is None else {name: self.artifact.dtype(name) for name in self.artifact.sites}

    @property
    def packed_bytes(self) -> int:
        """Bytes of all tensors, with the integers of sites in the narrowest of 4, 8, 16 or 32 bits."""
        names = self.source.shapes if self.artifact is None else self.artifact.names()
        rest = sum(self.source.read(name).nbytes for name in names if name not in self.forms)
        return rest + sum(packed_bytes(form) for form in self.forms.values())


def open_model(path: str | Path) -> OpenedModel:
    """An artifact or a model folder, ready to be traced."""
    path = checked(path)
    if not (path / MANIFEST).exists():
        source = inputs.open_source(from_path(path))
        check_exportable(source)
        # The graph covers the transformer; later steps of an encoder are not part of the file.
        if source.is_skeleton:
            load_transformer(source, path)
            return OpenedModel(source, dense_forms(source))
    artifact = trusted(path)
    if artifact.delta is not None:
        raise RequestError(
            f"{path}: is a delta, whose forms are no weights of the model; save the model that octavo.load gives, and "
            "export that"
        )
    if not (path / CONFIG).exists() or not is_known(path):
        raise RequestError(
            f"{path}: holds bare tensors without a graph to export; load them into their module with octavo.load(path, "
            "into=module) and call torch.onnx.export"
        )
    module = load_model(artifact)
    shapes = {name: tuple(entry["shape"]) for name, entry in artifact.sites.items()}
    source = Source(
        title=path.name, path=path, shapes=shapes, dtypes=dict.fromkeys(shapes, torch.float32), aliases={},
        read=artifact.tensor, module=module, is_transformers=True,
    )  # fmt: skip
    # The file computes in float32, with weights rounded as in the artifact. Decoded transformers models refuse their
    # own method of this name.
    source.module = nn.Module.float(module)
    bind(source, module)
    check_exportable(source)
    return OpenedModel(source, {name: _form(artifact, name) for name in shapes}, artifact)


def dense_forms(source: Source) -> dict[str, Form]:
    """Every matrix of a source as a dense form."""
    return {site.name: _dense(site.layout, source.read(site.name)) for site in source.sites()[0]}


def _form(artifact: Artifact, name: str) -> Form:
    """The form of a weight; scaled matrices are decoded first, since their form gives another weight."""
    layout = artifact.layout(name)
    return _dense(layout, artifact.tensor(name)) if layout.exponent else artifact.form(name)


def _dense(layout: Layout, weight: Tensor) -> Form:
    return Dense(replace(layout, exponent=0).to_matrix(weight))
