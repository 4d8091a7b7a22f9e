"""``transformers``: model folders as sources, and ``AutoModel.from_pretrained`` on artifacts."""

from __future__ import annotations

import importlib.abc
import importlib.util
import math
import sys
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from octavo.artifact.configuration import check_counts
from octavo.artifact.reading import AsWeight
from octavo.artifact.writing import split_name
from octavo.errors import ArtifactError, MissingExtraError, OctavoError, RequestError
from octavo.integrations.as_weight import made_by
from octavo.integrations.tasks import class_for, default_objective, json_object, tensor_shapes  # noqa: F401  (an objective is asked for here too)
from octavo.integrations.trust import guard_configurations, guard_encoders, known, root_of, trusted
from octavo.sources.bounded import bounded
from octavo.sources.sentences import (
    MODULE,
    bind_encoder,
    decode_members,
    is_installed,
    load_encoder,
    members,
    transformer_folder,
)
from octavo.sources.weight_files import NAMED

if TYPE_CHECKING:
    from octavo.artifact import Artifact
    from octavo.sources.sites import Source

_TARGET, _CONFIGURATIONS = "transformers.quantizers.auto", "transformers.configuration_utils"
_ENCODERS = "sentence_transformers.base.model"
#: No network, no pickles, no code from files.
_SAFE = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
#: Names of tensors that an error shows.
_NAMED = 3
#: Letters of another library's error that are shown.
_SHOWN = 600


def require_transformers() -> Any:
    """The package, or an error that says how to install it."""
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("this needs transformers, which is not installed: pip install 'octavo[hf]'") from error
    return transformers


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a model folder."""
    return json_object(folder / "config.json")


class _WithoutContent(TorchFunctionMode):
    """Makes tensors that will be filled later, which is what ``torch.empty`` is for, on the ``meta`` device.

    Tables that a model works out from its configuration, such as rotary ones, are real.
    """

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return function(*args, **{**(kwargs or {}), **({"device": "meta"} if function is torch.empty else {})})


def is_known(folder: Path) -> bool:
    """Whether ``transformers`` has the architecture of a model folder."""
    kind = read_config(folder).get("model_type")
    return isinstance(kind, str) and kind in require_transformers().CONFIG_MAPPING


def attach_module(source: Source, folder: Path) -> None:
    """Give a source the model of its folder, as a skeleton without weights.

    :func:`load_weights` fills it, or :mod:`octavo.calibration.blockwise` runs it block by block.
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
        with bounded(*_sizes(shapes)) if shapes else nullcontext():
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


def _sizes(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """How many tensors there are, and how many numbers they have together."""
    return len(shapes), sum(map(math.prod, shapes.values()))


def load_weights(source: Source) -> None:
    """Put the whole model of a folder in memory, in float32, in place of its skeleton, by its own loader."""
    assert source.path is not None
    if members(source.path) and is_installed() and not source.transformer_only:
        encoder = load_encoder(source.path)
        source.module, source.is_encoder = encoder, True
        bind_encoder(source, encoder, source.path)
        return
    folder = transformer_folder(source.path)
    loaded = load_as_users_do(folder, {"dtype": torch.float32})
    source.module = loaded.model
    bind(source, loaded.model)
    source.unfilled = loaded.missing


def bind(source: Source, module: nn.Module) -> None:
    """Say how the source's tensors reach the module, by the loader's own rules."""
    from octavo.sources.names import names_of

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
    from octavo.sources.names import names_of

    prefix = "" if inner == source.folder else f"{inner.name}/"
    shapes = source.every_shape().items()
    own = {name.removeprefix(prefix): shape for name, shape in shapes if split_name(name)[0] == prefix}
    found = names_of(skeleton(inner), own)
    source.unfilled, source.unused = found.missing, found.unused
    return source.unfilled


def tied_names(source: Source) -> set[str]:
    """Aliases that the model itself ties to the tensor that they are equal to, so that loading one fills both."""
    from octavo.sources.names import names_of

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


def artifact_config(folder: Path, dtype: torch.dtype | None) -> dict[str, Any]:
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


@dataclass
class Loaded:
    """A model as ``from_pretrained`` gives it.

    Parameters
    ----------
    missing
        Names of the model that nothing in the files filled; they have random values.
    unexpected
        Names in the files that the model has no place for.
    """

    model: nn.Module
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


def load_as_users_do(folder: Path, options: Mapping[str, Any] | None = None) -> Loaded:
    """Load a model folder or an artifact by the class that its config names, and say what did not fit.

    Parameters
    ----------
    options
        Further arguments of ``from_pretrained``, such as a dtype.

    Raises
    ------
    RequestError
        If the loader fails on a source.
    ArtifactError
        If it fails on an artifact, or must not see what the artifact's configuration says.
    """
    root = root_of(folder)
    return _load(folder, options or {}, None if root is None else trusted(root))


def _load(
    folder: Path, options: Mapping[str, Any], artifact: Artifact | None, as_weight: AsWeight | None = None
) -> Loaded:
    register()
    transformers = require_transformers()
    transformers.utils.logging.disable_progress_bar()
    given = {**_SAFE, "output_loading_info": True, **options}
    if artifact is not None and read_config(folder).get("use_pretrained_backbone"):
        # All weights are in the artifact; those of a backbone would be asked for at a hub.
        given["use_pretrained_backbone"] = False
    try:
        with ExitStack() as checks:
            if artifact is not None:
                checks.enter_context(known(artifact))
                checks.enter_context(bounded(*_sizes(artifact.loadable_shapes())))
            if as_weight is not None:
                checks.enter_context(made_by(as_weight))
                config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
                config.quantization_config = {**config.quantization_config, "packed": True}
                given.update(config=config, dtype=torch.bfloat16)
            model, info = class_for(folder).from_pretrained(folder, **given)
    except OctavoError:
        raise
    except Exception as error:
        # A configuration can be wrong in as many ways as there are architectures, and each raises what it likes.
        kind = RequestError if artifact is None else ArtifactError
        raise kind(f"{folder}: from_pretrained failed ({type(error).__name__}): {str(error)[:_SHOWN]}") from error
    missing = [*info["missing_keys"], *(str(key) for key in info.get("mismatched_keys", ()))]
    if (
        artifact is not None
        and artifact.unfilled is not None
        and (lacking := sorted({*missing} - {*artifact.unfilled}))
    ):
        raise ArtifactError(
            f"{folder}: {len(lacking)} tensors of the model are filled by nothing in the artifact, and were in the "
            f"source: {', '.join(lacking[:_NAMED])}; config.json was changed, or this version of transformers builds "
            "another model"
        )
    return Loaded(model.eval(), sorted(missing), sorted(info["unexpected_keys"]))


def load_model(artifact: Artifact, as_weight: AsWeight | None = None) -> nn.Module:
    """The model of a trusted artifact, of the class that its config names; with ``as_weight`` it runs in bfloat16."""
    return _load(artifact.path, {}, artifact, as_weight).model


def register() -> None:
    """Make the loaders of ``transformers`` and ``sentence-transformers`` understand artifacts, now or once imported."""
    for name, then in _ON_IMPORT.items():
        if name in sys.modules:
            if name not in _DONE:
                _DONE.add(name)
                then(sys.modules[name])
        elif not any(isinstance(finder, _OnImport) and finder.name == name for finder in sys.meta_path):
            # Importing these takes longer than everything else together; whoever does not use them need not wait.
            sys.meta_path.insert(0, _OnImport(name))


class _OnImport(importlib.abc.MetaPathFinder):
    """Does something right after a module was imported."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            _DONE.add(self.name)
            _ON_IMPORT[self.name](module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register_quantizer(module: Any) -> None:
    importlib.import_module("octavo.integrations.quantizer")


#: What is done once a module was imported, and for which that has been.
_ON_IMPORT = {
    _CONFIGURATIONS: guard_configurations,
    _TARGET: _register_quantizer,
    _ENCODERS: guard_encoders,
    MODULE: decode_members,
}
_DONE: set[str] = set()
