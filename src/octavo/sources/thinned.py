"""The source of a model that lost some of its units: smaller tensors under the same names."""

from __future__ import annotations

import json
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import RequestError
from octavo.sources.companions import copy_companions
from octavo.sources.model_classes import read_config
from octavo.sources.modules import own_tensors
from octavo.sources.sentences import transformer_folder
from octavo.sources.sites import Source, examine


@torch.no_grad()
def thinned(source: Source, module: nn.Module) -> Source:
    """The source whose module is ``module``, a copy of its own in which tensors were changed or became smaller.

    The changed tensors of ``module`` are rounded to the dtypes of the source, so that it computes with what is stored.
    Where the model has a config, entries that differ are written into a copy of it.

    Raises
    ------
    RequestError
        If the source's tensors do not have the shapes of its module's, or a changed one is not finite.
    """
    if source.conversions:
        raise RequestError(
            f"{source.path or source.title}: {source.conversions[0].names[0]!r} has another shape in the model, so it "
            "cannot be cut; leave the cut out"
        )
    before, after = own_tensors(source.module or module), own_tensors(module)
    changed: dict[str, Tensor] = {}
    for name, target in source.direct.items():
        old, new = before[target], after[target]
        if name in source.shapes and (old.shape != new.shape or not torch.equal(old, new)):
            new.copy_(new.to(source.dtypes[name]))
            changed[name] = new

    def read(name: str) -> Tensor:
        return changed[name].detach().to(source.dtypes[name]) if name in changed else source.read(name)

    made = replace(
        source,
        module=module,
        shapes={**source.shapes, **{name: tuple(tensor.shape) for name, tensor in changed.items()}},
        read=read,
        digests={name: digest for name, digest in source.digests.items() if name not in changed},
        exponents={name: exponent for name, exponent in source.exponents.items() if name not in changed},
        notes=[],
        uncut=source,
    )
    if source.folder is not None:
        folder = tempfile.TemporaryDirectory(prefix="octavo-config-")
        weakref.finalize(made, folder.cleanup)
        made.companions = Path(folder.name)
        made.notes += copy_companions(source.folder, made.companions)
        inner = transformer_folder(source.folder)
        config = read_config(inner) | _differences(source.module, module)
        place = made.companions / inner.relative_to(source.folder) / "config.json"
        place.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    examine(made)
    return made


def _differences(before: Any, after: Any) -> dict[str, Any]:
    """The entries of a model's config that another one's has otherwise."""
    old, new = before.config.to_dict(), after.config.to_dict()
    return {key: value for key, value in new.items() if old.get(key) != value}
