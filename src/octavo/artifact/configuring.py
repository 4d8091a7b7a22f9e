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
from octavo.sources.source import Source
from octavo.sources.weight_files import ADAPTER_CONFIG, NAMED, is_adapter


def configurations(source: Source, *, plain: bool = False) -> dict[str, bytes]:
    """The configuration files of a source's artifact by relative path.

    They are those of the source, except a model's ``config.json``, which states that its weights are an artifact.

    Parameters
    ----------
    plain
        Whether nothing is encoded, so that the files are an ordinary model of ``transformers``, and the config says so.
    """
    if source.folder is None:
        return {}
    inner = transformer_folder(source.folder)
    found: dict[str, bytes] = {}
    is_model = (inner / "config.json").exists()
    if is_model or members(source.folder):
        names = (file.as_posix() for file in companion_files(source.folder) if is_configuration(file.as_posix()))
        found = {name: (source.folder / name).read_bytes() for name in names}
    elif is_adapter(source.folder):
        found = {ADAPTER_CONFIG: (source.folder / ADAPTER_CONFIG).read_bytes()}
    if is_model:
        # This includes architectures defined by code in the folder: users who trust that code can load the artifact.
        dtype = next((dtype for dtype in source.dtypes.values() if dtype.is_floating_point), None)
        text = json.dumps(_model_config(inner, dtype, plain=plain), indent=2) + "\n"
        found[(inner / "config.json").relative_to(source.folder).as_posix()] = text.encode()
    return found


def _model_config(folder: Path, dtype: torch.dtype | None, *, plain: bool) -> dict[str, Any]:
    """The source's config with the entry by which ``from_pretrained`` finds Octavo, if something is encoded.

    Parameters
    ----------
    dtype
        The dtype of the source's weights. If the config names none, loaders would use the stored dtype.
    """
    config = read_config(folder) | ({} if plain else {"quantization_config": {"quant_method": "octavo"}})
    # The artifact's file has the standard name.
    config.pop(NAMED, None)
    if dtype is not None and config.get("dtype") is None and config.get("torch_dtype") is None:
        config["dtype"] = str(dtype).removeprefix("torch.")
    return config
