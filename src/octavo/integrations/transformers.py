"""``transformers``: model folders as sources, and ``AutoModel.from_pretrained`` on artifacts."""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from octavo.errors import MissingExtraError, RequestError
from octavo.integrations.tasks import class_for, default_objective  # noqa: F401  (an objective is asked for here too)
from octavo.raw import raw_bytes

if TYPE_CHECKING:
    from octavo.sites import Source

_TARGET = "transformers.quantizers.auto"


def require_transformers() -> Any:
    """The package, or an error that says how to install it."""
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("this needs transformers, which is not installed: pip install 'octavo[hf]'") from error
    return transformers


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a model folder."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"{file}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise RequestError(f"{file}: not a JSON object")
    return config


class _WithoutContent(TorchFunctionMode):
    """Makes tensors that will be filled later, which is what ``torch.empty`` is for, on the ``meta`` device.

    Tables that a model works out from its configuration, such as rotary ones, are real.
    """

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return function(*args, **{**(kwargs or {}), **({"device": "meta"} if function is torch.empty else {})})


def is_known(folder: Path) -> bool:
    """Whether ``transformers`` has the architecture of a model folder."""
    return read_config(folder).get("model_type") in require_transformers().CONFIG_MAPPING


def attach_module(source: Source, folder: Path) -> None:
    """Give a source the model of its folder, as a skeleton without weights.

    :func:`load_weights` fills it, or :mod:`octavo.blockwise` runs it block by block.
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
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        cls = class_for(folder)
        with _WithoutContent():
            build = getattr(cls, "_from_config", None) or cls.from_config
            module = build(config, dtype=torch.float32)
    except Exception as error:
        # A config can be wrong in as many ways as there are architectures, and each raises what it likes.
        raise RequestError(f"{folder}: the model cannot be built from its config.json: {error}") from error
    # Keys and values of earlier tokens are of no use to one pass over whole texts.
    for part in (module.config, module.config.get_text_config()):
        part.use_cache = False
    source.module = module.eval()
    source.parameters = match_names(source, module)


def load_weights(source: Source) -> None:
    """Put the whole model of a folder in memory, in float32, in place of its skeleton."""
    assert source.path is not None
    cls = class_for(source.path)
    try:
        source.module = cls.from_pretrained(source.path, dtype=torch.float32, local_files_only=True).eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise RequestError(f"{source.path}: {cls.__name__}.from_pretrained failed: {error}") from error
    source.parameters = match_names(source, source.module)


def match_names(source: Source, module: nn.Module) -> dict[str, str]:
    """Tensor names of the source to names in the module, which may have gained or lost the base model's prefix."""
    state = module.state_dict()
    prefix = f"{getattr(module, 'base_model_prefix', '')}."
    names = {}
    tied = {alias: source.shapes[name] for alias, name in source.aliases.items()}
    for name, shape in {**source.shapes, **tied}.items():
        for candidate in (name, prefix + name, name.removeprefix(prefix)):
            if candidate in state and tuple(state[candidate].shape) == shape:
                names[name] = candidate
                break
    return names


def artifact_config(folder: Path) -> dict[str, Any]:
    """The source's config with the note by which ``from_pretrained`` finds Octavo."""
    return {**read_config(folder), "quantization_config": {"quant_method": "octavo"}}


def load_model(folder: Path, *, packed: bool = False) -> nn.Module:
    """The model of an artifact folder, of the class that its config names; ``packed`` runs in bfloat16."""
    register()
    options: dict[str, Any] = {"local_files_only": True}
    if packed:
        config = require_transformers().AutoConfig.from_pretrained(folder, **options)
        config.quantization_config = {**config.quantization_config, "packed": True}
        options.update(config=config, dtype=torch.bfloat16)
    return class_for(folder).from_pretrained(folder, **options).eval()


def register() -> None:
    """Make ``from_pretrained`` understand artifacts, now or as soon as ``transformers`` is imported."""
    if _TARGET in sys.modules:
        _register_quantizer()
    elif not any(isinstance(finder, _OnImport) for finder in sys.meta_path):
        # Importing transformers takes longer than everything else together; whoever does not use it need not wait.
        sys.meta_path.insert(0, _OnImport())


class _OnImport(importlib.abc.MetaPathFinder):
    """Registers the quantizer right after ``transformers.quantizers.auto`` was imported."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != _TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            _register_quantizer()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register_quantizer() -> None:
    from transformers.quantizers import auto

    if "octavo" in auto.AUTO_QUANTIZER_MAPPING:
        return
    from transformers.core_model_loading import ConversionOps, WeightConverter
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from octavo.artifact import Artifact

    @auto.register_quantization_config("octavo")
    class OctavoConfig(QuantizationConfigMixin):
        """Says that the weights of this folder are an Octavo artifact."""

        def __init__(self, quant_method: str = "octavo", packed: bool = False, **_: Any) -> None:
            self.quant_method = quant_method  # type: ignore[assignment]
            self.packed = packed

    class Decode(ConversionOps):
        """Exchanges the packed bytes of a site for its weight."""

        def __init__(self, hf_quantizer: OctavoQuantizer) -> None:
            self.hf_quantizer = hf_quantizer

        def __deepcopy__(self, memo: dict) -> Decode:
            return self  # The loader copies converters; the decoded weights must not be copied with them.

        def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
            model, name = kwargs.get("model"), kwargs.get("full_layer_name", "")
            wanted = model.state_dict(keep_vars=True).get(name) if model is not None else None
            dtype = None if wanted is None else wanted.dtype
            return {
                pattern: [self.hf_quantizer.decoded(tensor, dtype) for tensor in _as_list(tensors)]
                for pattern, tensors in input_dict.items()
            }

    @auto.register_quantizer("octavo")
    class OctavoQuantizer(HfQuantizer):
        """Decodes an artifact while ``from_pretrained`` loads it; the model then runs dense, or from packed codes."""

        requires_calibration = True

        def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
            super().__init__(quantization_config, **kwargs)
            self._packed: bool = quantization_config.packed
            self._weights: dict[int, Tensor] = {}
            self._leaves: list[str] = []

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            files = kwargs.get("checkpoint_files") or []
            if files:
                artifact = Artifact(Path(files[0]).parent)
                coded = {name: entry["crc"] for name, entry in artifact.sites.items()}
                coded.update({name: entry[0] for name, entry in artifact.coded.items()})
                state = artifact.state(coded, packed=self._packed)
                # Names may change on the way into the model; a blob's checksum does not.
                self._weights = {crc: state[name] for name, crc in coded.items()}
                self._leaves = sorted({name.rpartition(".")[2] for name in coded})
            return model

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            self._weights = {}
            return model

        def get_weight_conversions(self) -> list:
            return [WeightConverter(leaf, leaf, [Decode(self)]) for leaf in self._leaves]

        def update_weight_conversions(self, weight_conversions: list, model: Any) -> list:
            for converter in weight_conversions:
                if isinstance(converter, WeightConverter):
                    converter.operations.insert(0, Decode(self))
            return weight_conversions + self.get_weight_conversions()

        def decoded(self, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
            if tensor.dtype == torch.uint8 and tensor.ndim == 1:
                found = self._weights.get(zlib.crc32(raw_bytes(tensor)))
                tensor = tensor if found is None else found
            # Casting a packed weight changes what it decodes to; its codes are not touched.
            return tensor if dtype is None else tensor.to(dtype)

        def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return True


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]
