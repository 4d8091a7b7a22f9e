"""The configuration files that an artifact is written with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from octavo.artifact.configuration import is_configuration
from octavo.sources.companions import companion_files
from octavo.sources.model_classes import read_config
from octavo.sources.sentences import members, transformer_folder
from octavo.sources.sites import Source
from octavo.sources.weight_files import NAMED


def configurations(source: Source) -> dict[str, bytes]:
    """The configuration files of a source's artifact by their place in its folder, sub-folders with a slash.

    They are the source's own, but for ``config.json`` of a model, which says that its weights are an artifact.
    """
    if source.folder is None:
        return {}
    inner = transformer_folder(source.folder)
    found: dict[str, bytes] = {}
    is_model = (inner / "config.json").exists()
    if is_model or members(source.folder):
        names = (file.as_posix() for file in companion_files(source.folder) if is_configuration(file.as_posix()))
        found = {name: (source.folder / name).read_bytes() for name in names}
    if is_model:
        # Also of an architecture that only the code beside it knows: whoever trusts that code can load the artifact.
        dtype = next((dtype for dtype in source.dtypes.values() if dtype.is_floating_point), None)
        text = json.dumps(_model_config(inner, dtype), indent=2) + "\n"
        found[(inner / "config.json").relative_to(source.folder).as_posix()] = text.encode()
    return found


def _model_config(folder: Path, dtype: torch.dtype | None) -> dict[str, Any]:
    """The source's config with the note by which ``from_pretrained`` finds Octavo.

    Parameters
    ----------
    dtype
        That of the source's weights. Where the config names none, loaders would take that of what is stored here.
    """
    config = {**read_config(folder), "quantization_config": {"quant_method": "octavo"}}
    # The artifact's file has the usual name.
    config.pop(NAMED, None)
    if dtype is not None and config.get("dtype") is None and config.get("torch_dtype") is None:
        config["dtype"] = str(dtype).removeprefix("torch.")
    return config
