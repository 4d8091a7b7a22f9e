"""Models of folders as skeletons without weights, and how the tensors of a source reach them."""

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
from octavo.sources.sites import Source


class _WithoutContent(TorchFunctionMode):
    """Makes tensors that will be filled later, which is what ``torch.empty`` is for, on the ``meta`` device.

    Tables that a model works out from its configuration, such as rotary ones, are real.
    """

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return function(*args, **{**(kwargs or {}), **({"device": "meta"} if function is torch.empty else {})})


def attach_module(source: Source, folder: Path) -> None:
    """Give a source the model of its folder, as a skeleton without weights.

    :func:`octavo.sources.loading.load_weights` fills it, or :mod:`octavo.calibration.blockwise` runs it block by block.
    An architecture that ``transformers`` does not know leaves the source without a module, with a note.
    """
    transformers = require_transformers()
    transformers.utils.logging.disable_progress_bar()
    if not is_known(folder):
        source.is_transformers = False
        source.notes.append(
            f"the architecture {read_config(folder).get('model_type')!r} is not known to transformers "
            f"{transformers.__version__}: the tensors are compressed on their own, without data, and nothing of the "
            "model is run"
        )
        return
    source.module = skeleton(folder)
    bind(source, source.module)


def skeleton(folder: Path) -> nn.Module:
    """The model of a folder without weights, in float32, by the class that its config names.

    Raises
    ------
    RequestError
        If it cannot be built.
    """
    transformers = require_transformers()
    shapes = tensor_shapes(folder)
    if shapes:
        # A folder without weights is one that was written here, of a model in memory.
        check_counts(folder / "config.json", read_config(folder), shapes.values(), RequestError)
    try:
        with bounded_by(shapes.values()) if shapes else nullcontext():
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            cls = class_for(folder)
            with _WithoutContent():
                build = getattr(cls, "_from_config", None) or cls.from_config
                module: Any = build(config, dtype=torch.float32)
    except Exception as error:
        # A config can be wrong in as many ways as there are architectures, and each raises what it likes.
        raise RequestError(f"{folder}: the model cannot be built from its config.json: {error}") from error
    # Keys and values of earlier tokens are of no use to one pass over whole texts.
    for part in (module.config, module.config.get_text_config()):
        part.use_cache = False
    return module.eval()


def bind(source: Source, module: nn.Module) -> None:
    """Say how the source's tensors reach the module, by the loader's own rules."""
    found = names_of(module, source.every_shape())
    converted = {name: item.targets[0] for item in found.conversions for name in item.names}
    source.parameters, source.conversions = {**found.parameters, **converted}, found.conversions
    source.unused = [name for name in found.unused if name in source.shapes]
    source.unfilled = found.missing


def unfilled_names(source: Source) -> list[str] | None:
    """Names of a source's model that none of its tensors fills; None if it has no model that is known here.

    A source of which nothing is run has no module. What its skeleton needs is found out here.
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
    """Aliases that the model itself ties to the tensor that they are equal to, so that loading one fills both."""
    folder, module = source.folder, source.module
    if module is None or folder is None:
        return set()
    direct = source.direct
    if source.path is None or not source.path.is_dir():
        # A model that was given in memory may be tied by hand; what counts is what its configuration ties.
        module = skeleton(transformer_folder(folder))
        direct = names_of(module, source.every_shape()).parameters
    state = module.state_dict(keep_vars=True)

    def held(name: str) -> int | None:
        parameter = direct.get(name)
        return None if parameter is None else id(state[parameter])

    pairs = ((alias, held(alias), held(name)) for alias, name in source.aliases.items())
    return {alias for alias, one, other in pairs if one is not None and one == other}
