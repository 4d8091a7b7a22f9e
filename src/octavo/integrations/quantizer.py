"""Octavo as a ``transformers`` quantizer, with which ``from_pretrained`` decodes an artifact.

Importing this module imports ``transformers`` and registers the quantizer.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from octavo.artifact import MANIFEST, Artifact
from octavo.errors import ArtifactError
from octavo.integrations.as_weight import chosen
from octavo.integrations.trust import root_of
from octavo.sources.names import names_of
from octavo.sources.sentences import split_name
from octavo.sources.shaped import fit_shapes
from octavo.system.notes import OctavoWarning

#: A model may have this many times the bytes of its tensors in the files (for tied weights), plus 64 MB.
_LARGER, _SLACK = 4, 64 << 20


@auto.register_quantization_config("octavo")
class OctavoConfig(QuantizationConfigMixin):
    """States that the weights of this folder are an Octavo artifact."""

    def __init__(self, quant_method: str = "octavo", packed: bool = False, **_: Any) -> None:
        if not isinstance(packed, bool):
            raise ArtifactError(f"config.json: packed is {str(packed)[:80]}; it must be true or false")
        self.quant_method = quant_method  # type: ignore[assignment]
        self.packed = packed


class Decode(ConversionOps):
    """The quantizer of a converter; incoming tensors are already decoded."""

    def __init__(self, hf_quantizer: OctavoQuantizer) -> None:
        # The loader does not change the dtype of tensors from an operation with this attribute.
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict) -> Decode:
        return self  # The loader copies converters; decoded weights must not be copied with them.

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The unchanged tensors."""
        return input_dict


class Decoding(WeightConverter):
    """A converter of the loader that gets decoded weights instead of packed bytes, by name."""

    __slots__ = ("original",)

    def __init__(
        self, source_patterns: Any, target_patterns: Any, operations: list[ConversionOps], force_cpu: bool = False
    ) -> None:
        super().__init__(source_patterns, target_patterns, operations, force_cpu)
        #: The replaced converter of the library, or None.
        self.original: WeightConverter | None = None

    @classmethod
    def of(cls, converter: WeightConverter, quantizer: OctavoQuantizer) -> Decoding:
        """Wrap a converter to use decoded weights."""
        sources, targets = converter._original_source_patterns, converter._original_target_patterns
        result = cls(list(sources), list(targets), [Decode(quantizer), *converter.operations], converter.force_cpu)
        result.scope_prefix, result.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
        result.original = converter
        return result

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        """Add a tensor of the checkpoint, or its decoded weight."""
        (operation,) = (item for item in self.operations if isinstance(item, Decode))
        decoded = operation.hf_quantizer.decoded(source_key, target_key, future)
        super().add_tensor(target_key, source_key, source_pattern, decoded)  # type: ignore[arg-type]


@auto.register_quantizer("octavo")
class OctavoQuantizer(HfQuantizer):
    """Decodes an artifact while ``from_pretrained`` loads it; the model runs dense, or from packed codes.

    A decoded model is an ordinary model: it can be trained, copied and saved. A model with packed codes cannot, and
    raises clear errors.
    """

    requires_calibration = True

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.packed: bool = quantization_config.packed
        self._weights: dict[str, Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._names: list[str] = []

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        files = kwargs.get("checkpoint_files") or []
        if files:
            # A member of a sentence encoder may be in a sub-folder, which prefixes its tensor names.
            folder = Path(files[0]).parent
            root = root_of(folder)
            if root is None:
                raise ArtifactError(
                    f"{folder}: config.json says that this is an artifact, but there is no {MANIFEST}; copy the "
                    "artifact again"
                )
            artifact = Artifact(root)
            prefix = "" if folder == root else f"{folder.name}/"
            _check_files(artifact, prefix, files)
            if artifact.reshaped:
                fit_shapes(model, _own_shapes(artifact, prefix))
            _tell_unfilled(artifact, prefix, model)
            _check_size(artifact, model)
            # Tied names are filled too, and may be in the files without content.
            stored = (*artifact.sites, *artifact.coded)
            # Of a delta nothing is as the loader reads it.
            stored = stored if artifact.delta is None else (*artifact.names(), *artifact.same)
            places = [(name, name) for name in stored] + list(artifact.aliases.items())
            wanted = dict.fromkeys(name for place, name in places if split_name(place)[0] == prefix)
            as_weight = chosen() if self.packed else None
            if self.packed and as_weight is None:
                raise ArtifactError(f"{root}: only octavo.load(path, packed=True) runs packed; leave packed out")
            state = artifact.state(wanted, as_weight=as_weight)
            self._weights = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
            self._names = list(self._weights)
            self._dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._weights, self._dtypes = {}, {}
        used = getattr(model, "_weight_conversions", None) or []
        plain = [entry.original if isinstance(entry, Decoding) else entry for entry in used]
        model._weight_conversions = [entry for entry in plain if entry is not None]
        if not self.packed:
            _make_ordinary(model)
        return model

    def get_weight_conversions(self) -> list:
        """Converters for weights that the model's own converters do not handle."""
        # Names may change before matching, so names of the model and of the files both count.
        leaves = sorted({name.rpartition(".")[2] for name in (*self._names, *self._dtypes)})
        # Names are used as patterns there, so names with unusual characters are skipped.
        return [Decoding(leaf, leaf, [Decode(self)]) for leaf in leaves if re.fullmatch(r"\w+", leaf)]

    def update_weight_conversions(self, weight_conversions: list, model: Any = None) -> list:
        """The model's converters, wrapped for decoded weights, and converters for all other weights.

        Before 5.21 the library gives no model.
        """
        own = [Decoding.of(x, self) if isinstance(x, WeightConverter) else x for x in weight_conversions]
        return own + self.get_weight_conversions()

    def decoded(self, name: str, target: str, future: Any) -> Callable[[], Tensor]:
        """A function that returns a checkpoint tensor in the dtype of the model's tensor."""
        dtype = self._dtypes.get(target)

        def given() -> Tensor:
            tensor = self._weights.get(name)
            if tensor is None:
                tensor = future() if callable(future) else future.result()
            # Casting a packed weight changes its decoded dtype, not its codes.
            return tensor if dtype is None else tensor.to(dtype)

        return given

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        if self.packed:
            raise NotImplementedError(
                "this model runs from packed codes and has no dense weights; load the artifact without packed=True"
            )
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether ``save_pretrained`` can write the model."""
        return not self.packed

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained."""
        return True


def _check_files(artifact: Artifact, prefix: str, files: Sequence[str | Path]) -> None:
    """Refuse unless the loader is about to read exactly the files of the artifact."""
    given = {Path(file).resolve() for file in files}
    names = (name for name in artifact.manifest["files"] if name.endswith(".safetensors"))
    own = {(artifact.path / name).resolve() for name in names if split_name(name)[0] == prefix}
    if given != own:
        odd = sorted(str(file) for file in given ^ own)
        raise ArtifactError(
            f"{artifact.path}: the loader chose files outside of the artifact: {', '.join(odd)[:300]}; remove them"
        )


def _own_shapes(artifact: Artifact, prefix: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in one folder of an artifact, by their names there."""
    shapes = artifact.loadable_shapes().items()
    return {name.removeprefix(prefix): shape for name, shape in shapes if split_name(name)[0] == prefix}


def _tell_unfilled(artifact: Artifact, prefix: str, model: Any) -> None:
    """Warn about parameters that will have random values although the source had them all."""
    if artifact.unfilled is None:
        return
    # Tied names are filled after loading the weights.
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = names_of(model, _own_shapes(artifact, prefix)).missing
    lacking = sorted(set(missing) - set(artifact.unfilled) - tied)
    if lacking:
        warnings.warn(
            f"{artifact.path}: the artifact does not fill {len(lacking)} parameters of {type(model).__name__}, such as "
            f"{lacking[0]}, so they will have random values; load the class that was compressed",
            OctavoWarning,
            stacklevel=2,
        )


def _check_size(artifact: Artifact, model: Any) -> None:
    """Refuse a model that is far larger than its files, since unfilled parts would be random."""
    held = sum(tensor.nbytes for tensor in {**dict(model.named_buffers()), **model.state_dict()}.values())
    stored = 4 * sum(math.prod(shape) for shape in artifact.loadable_shapes().values())
    if held > _LARGER * stored + _SLACK:
        raise ArtifactError(
            f"{artifact.path}: the configuration asks for {held} bytes of weights, but the files hold {stored}; they "
            "do not belong together, so copy the artifact again"
        )


def _make_ordinary(model: Any) -> None:
    """Remove the marks of a quantized model, which prevent casting, training and saving."""
    model.is_quantized = False
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            config.__dict__.pop("_is_quantized", None)
            config.__dict__.pop("quantization_config", None)
    model.__dict__.pop("quantization_method", None)
