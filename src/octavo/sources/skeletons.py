"""Building the models of folders without weights, and mapping a source's tensors to them."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from octavo.errors import RequestError
from octavo.sources.bounded import bounded_by
from octavo.sources.counts import check_counts
from octavo.sources.model_classes import class_for, is_known, read_config, require_transformers, tensor_shapes
from octavo.sources.names import names_of
from octavo.sources.sentences import split_name, transformer_folder
from octavo.sources.shaped import fit_shapes
from octavo.sources.source import Source


class _WithoutContent(TorchFunctionMode):
    """A context in which ``torch.empty`` creates tensors on the ``meta`` device, since they are filled later.

    Tables computed from the configuration, such as rotary tables, are real.
    """

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return function(*args, **{**(kwargs or {}), **({"device": "meta"} if function is torch.empty else {})})


def attach_module(source: Source, folder: Path) -> None:
    """Add the model of its folder to a source, as a skeleton without weights.

    :func:`octavo.sources.loading.load_weights` fills it, or :mod:`octavo.calibration.blockwise` runs it block by block.
    If ``transformers`` does not know the architecture, the source gets no module but a note.
    """
    transformers = require_transformers()
    transformers.utils.logging.disable_progress_bar()
    if not is_known(folder):
        source.is_transformers = False
        source.notes.append(
            f"the architecture {read_config(folder).get('model_type')!r} is not known to transformers "
            f"{transformers.__version__}: the tensors are compressed without data, and the model is not run"
        )
        return
    source.module = skeleton(folder)
    bind(source, source.module)


def skeleton(folder: Path) -> nn.Module:
    """Build the model of a folder without weights, in float32, from the class in its config.

    Raises
    ------
    RequestError
        If it cannot be built.
    """
    transformers = require_transformers()
    shapes = tensor_shapes(folder)
    if shapes:
        # A folder without weights was written by Octavo for a model in memory.
        check_counts(folder / "config.json", read_config(folder), shapes.values(), RequestError)
    try:
        with bounded_by(shapes.values()) if shapes else nullcontext():
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            cls = class_for(folder)
            with _WithoutContent():
                build = getattr(cls, "_from_config", None) or cls.from_config
                module: Any = build(config, dtype=torch.float32)
    except Exception as error:
        # An architecture may raise any exception for an invalid config.
        raise RequestError(
            f"{folder}: the model cannot be built from its config.json: {error}; correct the config"
        ) from error
    return module.eval()


def bind(source: Source, module: nn.Module) -> None:
    """Set the mapping of the source's tensors to the module, by the loader's own rules."""
    found = names_of(module, source.every_shape())
    converted = {name: item.targets[0] for item in found.conversions for name in item.names}
    source.parameters, source.conversions = {**found.parameters, **converted}, found.conversions
    source.unused = [name for name in found.unused if name in source.shapes]
    source.unfilled = found.missing


def unfilled_names(source: Source) -> list[str] | None:
    """Parameter names of a source's model that none of its tensors fills; None if its model is unknown.

    A source that is not run has no module, so a skeleton is built here.
    """
    if not source.is_transformers or source.folder is None:
        return None
    inner = transformer_folder(source.folder)
    if source.module is not None:
        return source.unfilled
    if importlib.util.find_spec("transformers") is None or not is_known(inner):
        return None
    prefix = "" if inner == source.folder else f"{inner.name}/"
    shapes = source.every_shape().items()
    own = {name.removeprefix(prefix): shape for name, shape in shapes if split_name(name)[0] == prefix}
    found = names_of(skeleton(inner), own)
    source.unfilled, source.unused = found.missing, found.unused
    return source.unfilled


def tied_names(source: Source) -> set[str]:
    """Aliases that the model itself ties, so that loading one tensor fills both."""
    folder, module = source.folder, source.module
    if module is None or folder is None:
        return set()
    direct = source.direct
    if source.path is None or not source.path.is_dir():
        # A model in memory may be tied by hand; only ties of its configuration count.
        module = skeleton(transformer_folder(folder))
        fit_shapes(module, source.every_shape())
        direct = names_of(module, source.every_shape()).parameters
    state = module.state_dict(keep_vars=True)

    def held(name: str) -> int | None:
        parameter = direct.get(name)
        return None if parameter is None else id(state[parameter])

    pairs = ((alias, held(alias), held(name)) for alias, name in source.aliases.items())
    return {alias for alias, one, other in pairs if one is not None and one == other}
