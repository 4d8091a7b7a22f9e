"""The objective for a ``transformers`` model, by the outputs of its class."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from pathlib import Path
from typing import Any

from octavo.calibration.objective import KL, Cosine, Objective, Squared
from octavo.errors import RequestError
from octavo.sources.model_classes import HEADED, HEADED_MODULE, json_object
from octavo.sources.sentences import Member, is_encoder_folder, members
from octavo.sources.source import Source
from octavo.sources.tokens import prompt_length

#: Class name suffixes of heads whose logits are a distribution over classes or tokens.
_DISTRIBUTIONS = re.compile(
    "CausalLM|LMHead|MaskedLM|ConditionalGeneration|Generation$|Seq2SeqLM|MTModel|EncoderDecoderModel|DoubleHeads|ForCTC|"
    "Classification|MultipleChoice|NextSentence|QuestionAnswering|SceneTextRecognition"
)
#: Modes by their names in the old format of a pooling configuration, in order of concatenation.
_OLD_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def default_objective(source: Source, folder: Path | None) -> Objective:
    """The objective for a ``transformers`` model, by the outputs of its class.

    KL for a distribution over classes, tokens or answer positions; cosine for states and embeddings; squared error for
    boxes, masks, depths, numbers and everything else. ``sentence-transformers`` encoders are pooled as configured in
    their folder.
    """
    model: Any = source.module
    if folder is not None and is_encoder_folder(folder):
        modules = members(folder)
        if not modules or modules[0].kind != HEADED_MODULE:
            return _cosine(folder, modules)
    name, fields = type(model).__name__, returned_fields(type(model))
    if "ForQuestionAnswering" in name and fields and not fields & {"start_logits", "logits"}:
        return Squared()
    if fields & {"start_logits", "prediction_logits"}:
        return KL()
    contrastive = {field for field in fields if field.startswith("logits_per_")}
    if contrastive or ("logits" not in fields and any(field.endswith("_embeds") for field in fields)):
        return Cosine()
    if HEADED.search(name) is None and (not fields or fields & {"last_hidden_state", "pooler_output"}):
        return Cosine()
    if _DISTRIBUTIONS.search(name) and (not fields or "logits" in fields) and "pred_boxes" not in fields:
        return Squared() if "Classification" in name and not _are_classes(model.config) else KL()
    return Squared()


def returned_fields(kind: type) -> set[str]:
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


def _cosine(folder: Path, modules: list[Member]) -> Cosine:
    """The cosine objective with the pooling of a ``sentence-transformers`` folder."""
    place = next((one.path for one in modules if one.kind == "Pooling"), "1_Pooling")
    if not (folder / place / "config.json").exists():
        return Cosine()
    config = json_object(folder / place / "config.json")
    pooling = config.get("pooling_mode") or [mode for old, mode in _OLD_MODES.items() if config.get(old)] or "mean"
    prompt = 0
    if not config.get("include_prompt", True):
        prompt = prompt_length(folder)
    try:
        return Cosine(pooling if isinstance(pooling, str) else "+".join(pooling), prompt)
    except (RequestError, TypeError) as error:
        raise RequestError(f"{folder / place / 'config.json'}: {error}") from error
