"""Loading the models of folders with their weights, by their own loaders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from octavo.errors import OctavoError, RequestError
from octavo.sources.encoders import bind_encoder, is_installed, load_encoder
from octavo.sources.model_classes import class_for, require_transformers
from octavo.sources.sentences import members, transformer_folder
from octavo.sources.skeletons import bind
from octavo.sources.source import Source

#: No network, no pickles, no code from files.
_SAFE = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
#: Largest number of characters shown of another library's error.
_SHOWN = 600


@dataclass
class Loaded:
    """A model loaded by ``from_pretrained``.

    Parameters
    ----------
    missing
        Parameter names that the files did not fill; they have random values.
    unexpected
        Names in the files that the model does not use.
    """

    model: nn.Module
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


def load_folder(folder: Path, options: Mapping[str, Any]) -> Loaded:
    """Load a model folder by the class in its config, and report mismatches.

    Parameters
    ----------
    options
        Further arguments of ``from_pretrained``, such as a dtype.
    """
    require_transformers().utils.logging.disable_progress_bar()
    model, info = class_for(folder).from_pretrained(folder, **_SAFE, output_loading_info=True, **options)
    missing = [*info["missing_keys"], *(str(key) for key in info.get("mismatched_keys", ()))]
    return Loaded(model.eval(), sorted(missing), sorted(info["unexpected_keys"]))


@contextmanager
def refused_as(kind: type[OctavoError], folder: Path) -> Iterator[None]:
    """A context that turns any exception of a loader into an error of ``kind`` that names the folder."""
    try:
        yield
    except OctavoError:
        raise
    except Exception as error:
        # An architecture may raise any exception for an invalid configuration.
        raise kind(f"{folder}: from_pretrained failed ({type(error).__name__}): {str(error)[:_SHOWN]}") from error


def load_weights(source: Source) -> None:
    """Replace a skeleton by the whole model of its folder in float32, with its own loader."""
    assert source.path is not None
    if members(source.path) and is_installed() and not source.transformer_only:
        encoder = load_encoder(source.path)
        source.module, source.is_encoder = encoder, True
        bind_encoder(source, encoder, source.path)
        return
    load_transformer(source, source.path)


def load_transformer(source: Source, path: Path) -> None:
    """Load the ``transformers`` model of a folder in float32 as a source's module.

    Raises
    ------
    RequestError
        If the loader fails.
    """
    folder = transformer_folder(path)
    with refused_as(RequestError, folder):
        loaded = load_folder(folder, {"dtype": torch.float32})
    source.module = loaded.model
    bind(source, loaded.model)
    source.unfilled = loaded.missing
