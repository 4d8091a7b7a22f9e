"""``sentence-transformers``: folders of several modules as one model, and its loader on artifacts.

Such a folder lists its modules in ``modules.json``. The first one is usually a ``transformers`` model. Others, such as
a dense layer after the pooling, keep their weights in sub-folders. In Octavo the names of their tensors start with the
sub-folder: ``2_Dense/linear.weight``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from octavo.errors import ArtifactError, MissingExtraError, OctavoError, RequestError
from octavo.system.paths import checked
from octavo.system.strict_json import read_object, read_plain

if TYPE_CHECKING:
    from octavo.sources.sites import Source

_WEIGHTS = "model.safetensors"
_BATCH = 32
#: The default class of a folder that names none.
_DENSE = "SentenceTransformer"
_KINDS = (_DENSE, "SparseEncoder", "CrossEncoder")
#: Largest size of a JSON file: 16 MB.
_MOST = 16 << 20
#: Largest size of a list of modules.
_LIST = 1 << 20
MODULE = "sentence_transformers.base.modules.module"


@dataclass(frozen=True)
class Member:
    """One module of an encoder: its sub-folder (empty for the encoder's folder) and its class."""

    path: str
    type: str

    @property
    def kind(self) -> str:
        """The class name without its module."""
        return self.type.rpartition(".")[2]


def members(folder: Path) -> list[Member]:
    """The modules of an encoder's folder in order; empty if it is not a ``sentence-transformers`` encoder.

    Raises
    ------
    RequestError
        If ``modules.json`` names a folder outside of this one.
    """
    return listed(folder) if is_encoder_folder(folder) else []


def listed(folder: Path) -> list[Member]:
    """The modules listed in ``modules.json``; empty if the file does not exist."""
    file = folder / "modules.json"
    if not file.is_file():
        return []
    try:
        entries = json.loads(read_plain(file, most=_LIST, error=RequestError))
        if not all(isinstance(entry[key], str) for entry in entries for key in ("path", "type")):
            raise TypeError("the path and the type of every module must be strings")
        found = [Member(entry["path"], entry["type"]) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RequestError(f"{file}: cannot be read as a list of modules: {error}; save the encoder again") from error
    for member in found:
        parts = PurePosixPath(member.path).parts
        if len(parts) > 1 or any(part.startswith(".") for part in parts) or PurePosixPath(member.path).is_absolute():
            raise RequestError(
                f"{file}: names the folder {member.path!r}, which is hidden or not directly below it; correct the entry"
            )
        try:
            checked(folder / member.path)
        except RequestError as error:
            raise RequestError(f"{file}: names an invalid folder: {error}") from error
    return found


def check_members(folder: Path) -> None:
    """Refuse an artifact with modules outside of ``sentence-transformers``, since naming a class imports its code.

    Raises
    ------
    ArtifactError
        If there is such a module.
    """
    for member in listed(folder):
        if not member.type.startswith("sentence_transformers."):
            raise ArtifactError(
                f"{folder / 'modules.json'}: names the class {member.type[:80]!r}, which is not one of "
                "sentence-transformers; its code is not run, load the tensors with octavo.Artifact(path).state()"
            )


def is_encoder_folder(folder: Path) -> bool:
    """Whether a folder is a ``sentence-transformers`` encoder.

    Rerankers and sparse encoders count as ``transformers`` models with a head, unless other modules have weights too.
    """
    if not (folder / "modules.json").is_file():
        return False
    return _model_type(folder) == _DENSE or any(file.parent.name[:1].isdigit() for file in folder.glob(f"*/{_WEIGHTS}"))


def _model_type(folder: Path) -> str:
    try:
        config = read_object(folder / "config_sentence_transformers.json", most=_MOST)
    except ArtifactError:
        return _DENSE
    return str(config.get("model_type", _DENSE))


def transformer_folder(folder: Path) -> Path:
    """The folder of the ``transformers`` model in an encoder's folder; other folders are returned unchanged."""
    first = next(iter(members(folder)), None)
    return folder / first.path if first is not None and first.kind == "Transformer" and first.path else folder


def weight_folders(folder: Path) -> list[tuple[str, Path]]:
    """Folders that hold weights, each with the prefix of its tensor names."""
    found = members(folder) if folder.is_dir() else []
    if not found:
        return [("", folder)]
    result = []
    for number, member in enumerate(found):
        place = folder / member.path
        if number == 0 and member.kind == "Transformer" and not place.is_dir():
            raise RequestError(
                f"{folder / 'modules.json'}: names {member.path!r}, which is missing; copy the whole folder"
            )
        if (number == 0 and member.kind == "Transformer") or (place / _WEIGHTS).is_file():
            result.append((f"{member.path}/" if member.path else "", place))
    return result


class SentenceEncoder(nn.Module):
    """An encoder as a module that takes its features by name and returns one vector per example.

    Parameters
    ----------
    encoder
        A ``SentenceTransformer``.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        prompt = self._prompt()
        # Pooling leaves out the prompt if it knows the prompt length and its configuration requires it.
        self._prompt_length = encoder.preprocess([""], **prompt).get("prompt_length") if prompt else None

    @property
    def transformer(self) -> nn.Module | None:
        """The ``transformers`` model inside, or None."""
        model = getattr(self.encoder[0], "model", None)
        return model if isinstance(model, nn.Module) and hasattr(model, "base_model_prefix") else None

    def forward(self, **features: Any) -> Tensor:
        """Sentence vectors (examples, dimensions)."""
        if type(self.encoder[0]).__name__ == "StaticEmbedding" and "offsets" not in features:
            features = _flat(features["input_ids"], features["attention_mask"])
        if self._prompt_length is not None:
            features = {"prompt_length": self._prompt_length, **features}
        result: Tensor = self.encoder(dict(features))["sentence_embedding"]
        return result

    def batches(self, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        """Batches of texts tokenized by the encoder's tokenizer; texts of similar length share a batch."""
        ordered, prompt = sorted(texts, key=len), self._prompt()
        made = (self.encoder.preprocess(ordered[at : at + _BATCH], **prompt) for at in range(0, len(ordered), _BATCH))
        return [_padded({k: v for k, v in batch.items() if isinstance(v, Tensor)}) for batch in made]

    def _prompt(self) -> dict[str, str]:
        """The default prompt put before every text, if any."""
        name = self.encoder.default_prompt_name
        prompt = self.encoder.prompts.get(name) if name is not None else None
        return {"prompt": prompt} if prompt else {}


def _flat(tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Concatenated tokens with the offsets of examples, the input of a static table."""
    lengths = mask.sum(1)
    return {"input_ids": tokens[mask.bool()], "offsets": lengths.cumsum(0) - lengths}


def _padded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse: one row per example, so that batches can be divided."""
    if "offsets" not in batch:
        return batch
    parts = batch["input_ids"].tensor_split(batch["offsets"][1:].tolist())
    tokens = nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(part) for part in parts], batch_first=True)
    return {"input_ids": tokens, "attention_mask": mask}


def load_encoder(folder: Path) -> SentenceEncoder:
    """Load an encoder's folder or artifact as its users do, in float32.

    Raises
    ------
    MissingExtraError
        If ``sentence-transformers`` is not installed.
    RequestError
        If it cannot be loaded.
    """
    try:
        import sentence_transformers
    except ImportError as error:
        raise MissingExtraError(
            f"{folder}: needs sentence-transformers, which cannot be imported ({error}): pip install 'octavo[st]'"
        ) from error
    from octavo.integrations.transformers import register

    register()
    kind = _model_type(folder)
    if kind not in _KINDS:
        raise RequestError(f"{folder}: is a {kind[:80]!r}, which is not supported; give one of {', '.join(_KINDS)}")
    try:
        encoder = getattr(sentence_transformers, kind)(
            str(folder), device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32}
        )
        return SentenceEncoder(encoder.eval()).eval()
    except OctavoError:
        raise
    except Exception as error:
        # Each module reads its own configuration and may raise any exception.
        raise RequestError(f"{folder}: {kind} cannot load it: {error}") from error


def is_installed() -> bool:
    """Whether encoders can be loaded with ``sentence-transformers``."""
    import importlib.util

    return importlib.util.find_spec("sentence_transformers") is not None


def bind_encoder(source: Source, encoder: SentenceEncoder, folder: Path) -> None:
    """Set the mapping of the source's tensors to the modules of an encoder."""
    from octavo.sources.conversions import Conversion
    from octavo.sources.names import names_of

    every = source.every_shape()
    parameters: dict[str, str] = {}
    conversions: list[Conversion] = []
    state = encoder.state_dict()
    modules = dict(encoder.encoder.named_children())
    for member, (child, module) in zip(members(folder), modules.items(), strict=True):
        prefix = f"{member.path}/" if member.path else ""
        own = {n.removeprefix(prefix): s for n, s in every.items() if n.startswith(prefix) and (prefix or "/" not in n)}
        model = encoder.transformer if module is encoder.encoder[0] else None
        if model is None:
            place = f"encoder.{child}."
            parameters.update(
                (prefix + name, place + name)
                for name, shape in own.items()
                if place + name in state and tuple(state[place + name].shape) == shape
            )
            continue
        place = f"encoder.{child}.model."
        found = names_of(model, own)
        parameters.update((prefix + name, place + target) for name, target in found.parameters.items())
        for item in found.conversions:
            names, targets = tuple(prefix + n for n in item.names), tuple(place + t for t in item.targets)
            conversions.append(Conversion(names, targets, _prefixed(item.function, place)))
            parameters.update(dict.fromkeys(names, targets[0]))
        source.unfilled = found.missing
    source.parameters, source.conversions = parameters, conversions
    source.unused = [name for name in source.shapes if name not in parameters]


def _prefixed(
    function: Callable[[Sequence[Tensor]], dict[str, Tensor]], place: str
) -> Callable[[Sequence[Tensor]], dict[str, Tensor]]:
    return lambda tensors: {place + name: value for name, value in function(tensors).items()}


def decode_members(module: Any) -> None:
    """Make the modules of ``sentence-transformers`` load their weights from artifacts.

    Parameters
    ----------
    module
        :data:`MODULE`, just imported.
    """
    usual = module.Module.load_torch_weights.__func__

    @functools.wraps(usual)
    def load_torch_weights(cls: Any, model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        from octavo.artifact import MANIFEST, Artifact

        folder = Path(model_name_or_path)
        if not (folder / MANIFEST).is_file():
            return usual(cls, model_name_or_path, *args, **kwargs)
        subfolder = str(args[0] if args else kwargs.get("subfolder", ""))
        prefix = f"{subfolder}/" if subfolder else ""
        artifact = Artifact(folder)
        # A tensor stored once may belong to several folders.
        stored = {**{name: name for name in artifact.names()}, **artifact.aliases}
        own = {name: of for name, of in stored.items() if name.startswith(prefix) and (prefix or "/" not in name)}
        found = artifact.state(set(own.values()))
        state = {name.removeprefix(prefix): found[of] for name, of in own.items()}
        target = kwargs.get("model")
        if target is None:
            return state
        # A tensor with two names in the module is stored under one.
        held = target.state_dict()
        filled = {held[name].data_ptr() for name in state if name in held}
        shared = {n: held[n] for n in held if n not in state and held[n].numel() and held[n].data_ptr() in filled}
        try:
            target.load_state_dict({**shared, **state})
        except RuntimeError as error:
            raise ArtifactError(f"{folder / subfolder}: does not fit its module: {error}") from error
        return target

    module.Module.load_torch_weights = classmethod(load_torch_weights)
