"""Folders of ``sentence-transformers``: the modules of an encoder, and which of them hold weights.

Such a folder lists its modules in ``modules.json``. The first one is usually a ``transformers`` model. Others, such as
a dense layer after the pooling, keep their weights in sub-folders. In Octavo the names of their tensors start with the
sub-folder: ``2_Dense/linear.weight``.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from octavo.errors import ArtifactError, RequestError
from octavo.system.paths import checked
from octavo.system.strict_json import read_object, read_plain

_WEIGHTS = "model.safetensors"
#: The default class of a folder that names none.
DENSE = "SentenceTransformer"
#: Largest size of a JSON file: 16 MB.
_MOST = 16 << 20
#: Largest size of a list of modules.
_LIST = 1 << 20
#: Sub-folders that may hold weights, such as ``2_Dense``.
SUBFOLDER = re.compile(r"\d{1,3}_\w{1,64}", re.ASCII)


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
    return model_type(folder) == DENSE or any(file.parent.name[:1].isdigit() for file in folder.glob(f"*/{_WEIGHTS}"))


def model_type(folder: Path) -> str:
    """The class of ``sentence-transformers`` that reads a folder."""
    try:
        config = read_object(folder / "config_sentence_transformers.json", most=_MOST)
    except ArtifactError:
        return DENSE
    return str(config.get("model_type", DENSE))


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


def split_name(name: str) -> tuple[str, str]:
    """The sub-folder of a tensor, with its slash, and its name there."""
    folder, slash, inner = name.partition("/")
    return (f"{folder}/", inner) if slash and SUBFOLDER.fullmatch(folder) and inner else ("", name)
