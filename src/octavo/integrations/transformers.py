"""Artifacts as ``transformers`` loads them: checked first, built no larger than their tensors, filled in whole."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from octavo.artifact import Artifact
from octavo.artifact.reading import AsWeight
from octavo.errors import ArtifactError, RequestError
from octavo.integrations.as_weight import made_by
from octavo.integrations.trust import known, root_of, trusted
from octavo.sources.bounded import bounded_by
from octavo.sources.loading import Loaded, load_folder, refused_as
from octavo.sources.model_classes import read_config, require_transformers

#: Number of tensor names that an error shows.
_NAMED = 3


def load_as_users_do(folder: Path, options: Mapping[str, Any] | None = None) -> Loaded:
    """Load a model folder or an artifact by the class in its config, and report mismatches.

    Parameters
    ----------
    options
        Further arguments of ``from_pretrained``, such as a dtype.

    Raises
    ------
    RequestError
        If the loader fails on a source.
    ArtifactError
        If it fails on an artifact, or the artifact's configuration is not safe to load.
    """
    root = root_of(folder)
    if root is not None:
        return _load(folder, options or {}, trusted(root))
    with refused_as(RequestError, folder):
        return load_folder(folder, options or {})


def load_model(artifact: Artifact, as_weight: AsWeight | None = None) -> nn.Module:
    """The model of a trusted artifact, of the class in its config; with ``as_weight`` it runs in bfloat16."""
    return _load(artifact.path, {}, artifact, as_weight).model


def _load(folder: Path, options: Mapping[str, Any], artifact: Artifact, as_weight: AsWeight | None = None) -> Loaded:
    if as_weight is not None and artifact.is_plain:
        raise RequestError(f"{folder}: nothing is encoded here that could run packed; leave packed out")
    given = dict(options)
    if read_config(folder).get("use_pretrained_backbone"):
        # All weights are in the artifact; backbone weights would be requested from a hub.
        given["use_pretrained_backbone"] = False
    with refused_as(ArtifactError, folder), ExitStack() as checks:
        checks.enter_context(known(artifact))
        checks.enter_context(bounded_by(artifact.loadable_shapes().values()))
        if as_weight is not None:
            checks.enter_context(made_by(as_weight))
            config = require_transformers().AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            config.quantization_config = {**config.quantization_config, "packed": True}
            given.update(config=config, dtype=torch.bfloat16)
        loaded = load_folder(folder, given)
    if artifact.unfilled is not None and (lacking := sorted({*loaded.missing} - {*artifact.unfilled})):
        raise ArtifactError(
            f"{folder}: the artifact does not fill {len(lacking)} tensors of the model that the source filled: "
            f"{', '.join(lacking[:_NAMED])}; config.json was changed, or this version of transformers builds another "
            "model"
        )
    return loaded
