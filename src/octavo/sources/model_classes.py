"""The package ``transformers``, if installed, and its class for a model folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from octavo.errors import MissingExtraError, RequestError
from octavo.sources.sentences import Member, members
from octavo.system.strict_json import read_object

#: Largest size of a configuration: 16 MB.
_MOST = 16 << 20
#: Class name pattern of models with a head; others return hidden states.
HEADED = re.compile("For[A-Z]|LMHead|DoubleHeads|MTModel|EncoderDecoderModel")
#: Modules of ``sentence-transformers`` that are heads, such as that of SPLADE.
HEADED_MODULE = "MLMTransformer"


def require_transformers() -> Any:
    """The package; raises an error that explains how to install it."""
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("this needs transformers, which is not installed: pip install 'octavo[hf]'") from error
    return transformers


def json_object(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file."""
    return read_object(file, most=_MOST, error=RequestError)


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a model folder."""
    return json_object(folder / "config.json")


def is_known(folder: Path) -> bool:
    """Whether ``transformers`` supports the architecture of a model folder."""
    kind = read_config(folder).get("model_type")
    return isinstance(kind, str) and kind in require_transformers().CONFIG_MAPPING


def class_for(folder: Path) -> Any:
    """The ``transformers`` class for a model folder.

    It is the class named in the configuration. If the files hold no head, or ``sentence-transformers`` reads the
    folder, it is the class without a head.
    """
    transformers = require_transformers()
    config = json_object(folder / "config.json")
    name = (config.get("architectures") or [""])[0]
    named = getattr(transformers, name, None) if isinstance(name, str) and name else None
    if not (isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)):
        return _bare(folder, None)
    first = _first_member(folder)
    if first is not None and first.kind != HEADED_MODULE:
        return named if not HEADED.search(name) else _bare(folder, named)
    return named if HEADED.search(name) is None or _has_head(folder, named) else _bare(folder, named)


def _bare(folder: Path, named: Any) -> Any:
    """The class of the model without a head."""
    transformers = require_transformers()
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    kinds = transformers.AutoModel._model_mapping.get(type(config), None)
    kind = kinds[0] if isinstance(kinds, tuple) else kinds
    if kind is not None and _first_member(folder) is not None and config.is_encoder_decoder:
        # Like sentence-transformers: only the encoder is read.
        kind = getattr(transformers, kind.__name__.removesuffix("Model") + "EncoderModel", kind)
    return kind or named or transformers.AutoModel


def _has_head(folder: Path, named: Any) -> bool:
    """Whether the files of a folder hold the head of a class, by tensor names.

    A head tied to the token table is not in any file. A head with a name from older versions appears as a part that the
    model without a head lacks.
    """
    names, prefix = set(tensor_shapes(folder)), f"{named.base_model_prefix}."
    if any(name.startswith(prefix) for name in names):
        # Written by a class with a head, since the class without one uses no prefix.
        return True
    config = require_transformers().AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    bare = _bare(folder, None)
    if not names or not hasattr(bare, "_from_config") or bare is named:
        return True
    with torch.device("meta"):
        model, base = named._from_config(config), bare._from_config(config)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    head = {name.partition(".")[0] for name in set(model.state_dict()) - tied if not name.startswith(prefix)}
    own = {name.partition(".")[0] for name in base.state_dict()}
    seen = {part for name in names for part in name.split(".")}
    return not head or bool(seen & head) or not {name.partition(".")[0] for name in names} <= own


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a folder's files."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, framework="pt") as handle:
                # A handle is not a mapping.
                shapes.update((name, tuple(handle.get_slice(name).get_shape())) for name in handle.keys())  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise RequestError(
                f"{file}: cannot be read as safetensors, it may be truncated: {error}; copy it again"
            ) from error
    return shapes


def _first_member(folder: Path) -> Member | None:
    """The ``sentence-transformers`` module that reads a folder (the encoder's or a sub-folder)."""
    above = [one for one in members(folder.parent)[:1] if one.path == folder.name]
    return next(iter(members(folder) or above), None)
