"""The task of a ``transformers`` model: the class that loads its folder, and its objective."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from octavo.calibration.objective import KL, Cosine, Objective, Squared
from octavo.errors import RequestError
from octavo.sources.sentences import Member, is_encoder_folder, members
from octavo.system.strict_json import read_object

if TYPE_CHECKING:
    from octavo.sources.sites import Source

#: Largest size of a configuration: 16 MB.
_MOST = 16 << 20
#: Class name suffixes of heads whose logits are a distribution over classes or tokens.
_DISTRIBUTIONS = re.compile(
    "CausalLM|LMHead|MaskedLM|ConditionalGeneration|Generation$|Seq2SeqLM|MTModel|EncoderDecoderModel|DoubleHeads|ForCTC|"
    "Classification|MultipleChoice|NextSentence|QuestionAnswering|SceneTextRecognition"
)
#: Class name pattern of models with a head; others return hidden states.
_HEADED = re.compile("For[A-Z]|LMHead|DoubleHeads|MTModel|EncoderDecoderModel")
#: Modules of ``sentence-transformers`` that are heads, such as that of SPLADE.
_HEADED_MODULE = "MLMTransformer"
#: Modes by their names in the old format of a pooling configuration, in order of concatenation.
_OLD_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def class_for(folder: Path) -> Any:
    """The ``transformers`` class for a model folder.

    It is the class named in the configuration. If the files hold no head, or ``sentence-transformers`` reads the
    folder, it is the class without a head.
    """
    transformers = _transformers()
    config = json_object(folder / "config.json")
    name = (config.get("architectures") or [""])[0]
    named = getattr(transformers, name, None) if isinstance(name, str) and name else None
    if not (isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)):
        return _bare(folder, None)
    first = _first_member(folder)
    if first is not None and first.kind != _HEADED_MODULE:
        return named if not _HEADED.search(name) else _bare(folder, named)
    return named if _HEADED.search(name) is None or _has_head(folder, named) else _bare(folder, named)


def default_objective(source: Source, folder: Path | None) -> Objective:
    """The objective for a ``transformers`` model, by the outputs of its class.

    KL for a distribution over classes, tokens or answer positions; cosine for states and embeddings; squared error for
    boxes, masks, depths, numbers and everything else. ``sentence-transformers`` encoders are pooled as configured in
    their folder.
    """
    model: Any = source.module
    if folder is not None and is_encoder_folder(folder):
        modules = members(folder)
        if not modules or modules[0].kind != _HEADED_MODULE:
            return _cosine(folder, modules)
    name, fields = type(model).__name__, returned(type(model))
    if "ForQuestionAnswering" in name and fields and not fields & {"start_logits", "logits"}:
        return Squared()
    if fields & {"start_logits", "prediction_logits"}:
        return KL()
    contrastive = {field for field in fields if field.startswith("logits_per_")}
    if contrastive or ("logits" not in fields and any(field.endswith("_embeds") for field in fields)):
        return Cosine()
    if _HEADED.search(name) is None and (not fields or fields & {"last_hidden_state", "pooler_output"}):
        return Cosine()
    if _DISTRIBUTIONS.search(name) and (not fields or "logits" in fields) and "pred_boxes" not in fields:
        return Squared() if "Classification" in name and not _are_classes(model.config) else KL()
    return Squared()


def returned(kind: type) -> set[str]:
    """Names of the outputs of a model's ``forward``, from its annotation; empty if it has none."""
    function: Any = inspect.unwrap(getattr(kind, "forward", kind))
    wanted = getattr(function, "__annotations__", {}).get("return")
    if isinstance(wanted, str):
        # Quoted names are looked up where the function is defined; nothing else is evaluated.
        scope = getattr(function, "__globals__", {})
        options = [scope.get(name) for name in re.findall(r"\w+", wanted)]
    else:
        options = [wanted, *typing.get_args(wanted)]
    found = next((one for one in options if isinstance(one, type) and dataclasses.is_dataclass(one)), None)
    return {field.name for field in dataclasses.fields(found)} if found is not None else set()


def _are_classes(config: Any) -> bool:
    """Whether a classifier predicts one label (not a number, and not several independent labels)."""
    return config.num_labels > 1 and config.problem_type in (None, "single_label_classification")


def _bare(folder: Path, named: Any) -> Any:
    """The class of the model without a head."""
    transformers = _transformers()
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
    config = _transformers().AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
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
            raise RequestError(f"{file}: cannot be read as safetensors, it may be truncated: {error}") from error
    return shapes


def _first_member(folder: Path) -> Member | None:
    """The ``sentence-transformers`` module that reads a folder (the encoder's or a sub-folder)."""
    above = [one for one in members(folder.parent)[:1] if one.path == folder.name]
    return next(iter(members(folder) or above), None)


def _cosine(folder: Path, modules: list[Member]) -> Cosine:
    """The cosine objective with the pooling of a ``sentence-transformers`` folder."""
    place = next((one.path for one in modules if one.kind == "Pooling"), "1_Pooling")
    if not (folder / place / "config.json").exists():
        return Cosine()
    config = json_object(folder / place / "config.json")
    pooling = config.get("pooling_mode") or [mode for old, mode in _OLD_MODES.items() if config.get(old)] or "mean"
    prompt = 0
    if not config.get("include_prompt", True):
        from octavo.sources.tokens import prompt_length

        prompt = prompt_length(folder)
    try:
        return Cosine(pooling if isinstance(pooling, str) else "+".join(pooling), prompt)
    except (RequestError, TypeError) as error:
        raise RequestError(f"{folder / place / 'config.json'}: {error}") from error


def _transformers() -> Any:
    from octavo.integrations.transformers import require_transformers

    return require_transformers()


def json_object(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file."""
    return read_object(file, most=_MOST, error=RequestError)
