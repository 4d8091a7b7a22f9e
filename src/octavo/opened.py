"""Opening an artifact or a model folder together with the form of every site."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from octavo import inputs
from octavo.artifact import MANIFEST, Artifact
from octavo.errors import RequestError
from octavo.files import from_path
from octavo.forms import Dense, Form
from octavo.runtimes.given import check_exportable
from octavo.runtimes.small import packed_bytes
from octavo.sites import Source


@dataclass
class Opened:
    """A source or an artifact, with the form of every site."""

    source: Source
    forms: dict[str, Form]
    artifact: Artifact | None = None

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """What the weights of an artifact are rounded to after they were decoded, by site."""
        return {} if self.artifact is None else {name: self.artifact.dtype(name) for name in self.artifact.sites}

    @property
    def packed_bytes(self) -> int:
        """Bytes of all tensors with the integers of sites at 4, 8, 16 or 32 bits, whichever hold them."""
        names = self.source.shapes if self.artifact is None else self.artifact.names()
        rest = sum(self.source.read(name).nbytes for name in names if name not in self.forms)
        return rest + sum(packed_bytes(form) for form in self.forms.values())


def open_model(path: str | Path) -> Opened:
    """An artifact or a model folder, ready to be traced."""
    path = Path(path)
    if not (path / MANIFEST).exists():
        source = inputs.open_source(from_path(path))
        check_exportable(source)
        inputs.model_of(source, blockwise=False)
        source.parameters |= _equal_parameters(source)
        return Opened(source, dense_forms(source))
    from octavo.integrations.transformers import match_names
    from octavo.verify import load

    artifact = Artifact(path)
    module = load(path)
    if not isinstance(module, nn.Module):
        raise RequestError(
            f"{path}: holds bare tensors, which have no graph to export; load them into their module with "
            "octavo.load(path, into=module) and call torch.onnx.export"
        )
    shapes = {name: tuple(entry["shape"]) for name, entry in artifact.sites.items()}
    source = Source(
        title=path.name, path=path, shapes=shapes, dtypes=dict.fromkeys(shapes, torch.float32), aliases={},
        read=artifact.tensor, module=module, is_transformers=True,
    )  # fmt: skip
    # The file computes in float32, with the weights as they are rounded in the artifact.
    # Models of transformers that were decoded refuse a method of this name of their own.
    source.module = nn.Module.float(module)
    source.parameters = match_names(source, module)
    source.parameters |= _equal_parameters(source)
    check_exportable(source)
    forms = {name: artifact.form(name) for name in shapes}
    return Opened(source, forms, artifact)


def dense_forms(source: Source) -> dict[str, Form]:
    """Every matrix of a source as it is."""
    return {site.name: Dense(site.layout.to_matrix(source.read(site.name))) for site in source.sites()[0]}


def _equal_parameters(source: Source) -> dict[str, str]:
    """Tensors whose names are in the module under others, by what they hold."""
    assert source.module is not None
    taken, found = set(source.parameters.values()), {}
    free = {name: value for name, value in source.module.named_parameters() if name not in taken}
    for site in source.sites()[0] if free else ():
        if site.name in source.parameters:
            continue
        weight = source.read(site.name).float()
        same = (name for name, value in free.items() if value.shape == weight.shape and torch.equal(value, weight))
        name = next(same, None)
        if name is not None:
            found[site.name] = name
            del free[name]
    return found
