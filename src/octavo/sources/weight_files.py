"""Which files of a folder hold the weights: those that ``from_pretrained`` would load, and no others."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from octavo.errors import RequestError
from octavo.system.paths import checked
from octavo.system.sealed import JOB

#: What a file of weights, of whatever format, ends with.
_ENDINGS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".onnx", ".onnx_data",
    ".onnx.data", ".gguf", ".ggml", ".npz", ".npy", ".ot", ".pb", ".tflite", ".nemo", ".mlmodel", ".keras", ".joblib",
)  # fmt: skip
_INDEX = re.compile(r".*\.index(\..+)?\.json")
#: Formats that are read by running what they say.
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors")
#: The same weights in another precision, which ``from_pretrained(variant=...)`` asks for.
_VARIANT = re.compile(r"model\..+\.safetensors")
_ADAPTER = re.compile(r"adapter_model.*\.safetensors")
#: The key of ``config.json`` that names the file of the weights.
NAMED = "transformers_weights"
#: Folders below the model's that are looked into.
_DEEP = 3


@dataclass(frozen=True)
class WeightFiles:
    """Files that hold the weights.

    Parameters
    ----------
    promised
        If there is an index, in which file it says that each tensor is.
    usual
        Whether ``from_pretrained`` finds them by itself.
    index
        The index itself.
    """

    files: list[Path]
    promised: dict[str, Path] = field(default_factory=dict)
    usual: bool = True
    index: Path | None = None


def is_weights(name: str) -> bool:
    """Whether a file of that name holds weights, or is an index of such files."""
    return name.lower().endswith(_ENDINGS) or _INDEX.fullmatch(name.lower()) is not None


def weight_files(path: Path) -> WeightFiles:
    """The files that hold the weights of a file, an index or a folder, in the order of preference of ``transformers``.

    That is what ``transformers_weights`` in ``config.json`` names, else ``model.safetensors``, else the shards that
    ``model.safetensors.index.json`` names. Where none is there, complete shards without an index are taken, or the only
    other file. A folder without ``config.json`` may hold several files. Adapters are never taken, and variants such as
    ``model.fp16.safetensors`` only where nothing else is.

    Raises
    ------
    RequestError
        If there are none, or several that could be meant, or a shard is missing.
    """
    if path.is_file():
        if path.name.endswith(".index.json"):
            return _indexed(path)
        if path.suffix != ".safetensors":
            raise RequestError(_unreadable(path))
        return WeightFiles([path])
    index = path / "model.safetensors.index.json"
    for file in (_named(path), path / "model.safetensors", index):
        if file is not None and file.is_file():
            return _indexed(file) if file.name.endswith(".json") else WeightFiles([file])
    return replace(_others(path), usual=False)


def _named(folder: Path) -> Path | None:
    """The file that the config names, which goes before all others."""
    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8"))[NAMED]
        inside = (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        # A damaged config is reported by who builds the model from it.
        return None
    return folder / name if inside and name.endswith((".safetensors", ".safetensors.index.json")) else None


def beside(folder: Path, counted: Collection[Path]) -> list[str]:
    """Names of all other files of weights in a folder and below it."""
    return [file.relative_to(folder).as_posix() for file in _walk(folder) if file not in counted]


def _walk(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        depth = len(Path(place).relative_to(folder).parts)
        if depth and JOB in names:
            # A run's kept work, which is nobody's weights.
            folders.clear()
            continue
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if depth + 1 < _DEEP else []
        yield from (Path(place, name) for name in sorted(names) if is_weights(name) and not name.startswith("."))


def _others(folder: Path) -> WeightFiles:
    """Weights under other names than those that ``from_pretrained`` looks for."""
    files = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    files = [file for file in files if not _ADAPTER.fullmatch(file.name)]
    # Variants are the weights only where nothing else is.
    files = [file for file in files if not _VARIANT.fullmatch(file.name)] or files
    if not files and not indexes:
        raise RequestError(_nothing(folder))
    pickled = [name for name in ("pytorch_model.bin", "pytorch_model.bin.index.json") if (folder / name).is_file()]
    is_model = (folder / "config.json").exists()
    if pickled and is_model:
        raise RequestError(
            f"{folder}: from_pretrained loads {pickled[0]} here and not {(indexes or files)[0].name}; load the model "
            "and write it with save_pretrained, or name the .safetensors file itself"
        )
    shards = _shards(files)
    if "model" in shards:
        return WeightFiles(shards["model"])
    if len(indexes) > 1:
        raise RequestError(f"{folder}: holds several indexes, name one of them: {_listed(indexes)}")
    if indexes:
        return _indexed(indexes[0])
    if is_model and len(files) > 1 and len(shards) != 1:
        raise RequestError(
            f"{folder}: holds no model.safetensors, and several files that could be meant ({_listed(files)}); rename "
            "the one that holds the model, or name it as the source"
        )
    return WeightFiles(next(iter(shards.values())) if is_model and shards else files)


def _shards(files: Sequence[Path]) -> dict[str, list[Path]]:
    """Complete sets of shards, by what their names begin with."""
    sets: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for file in files:
        match = _SHARD.fullmatch(file.name)
        if match:
            sets[match["stem"], match["count"]].append(file)
    found: dict[str, list[Path]] = {}
    for (stem, count), parts in sets.items():
        first = _SHARD.fullmatch(parts[0].name)
        assert first is not None
        width = len(first["number"])
        # Counting stops at the first that is missing, however many a name claims there are.
        for number in range(1, int(count) + 1):
            name = f"{stem}-{number:0{width}}-of-{count}.safetensors"
            if parts[0].with_name(name) not in parts:
                raise RequestError(
                    f"{parts[0].parent}: shard {name} is missing beside {parts[0].name}; copy it and the index there"
                )
        if stem in found:
            raise RequestError(
                f"{parts[0].parent}: holds shards of two models, {found[stem][0].name} and {parts[0].name}; remove the "
                "old ones"
            )
        found[stem] = parts
    return found


def _indexed(index: Path) -> WeightFiles:
    try:
        promised = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"].items())
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise RequestError(f"{index}: not an index of safetensors shards: {error}") from error
    if not all(isinstance(name, str) for name in promised.values()):
        raise RequestError(f"{index}: not an index of safetensors shards: a shard's name is not a string")
    files = [index.parent / name for name in sorted(set(promised.values()))]
    for file in files:
        if not checked(file).exists():
            raise RequestError(f"{index}: names the shard {file.name}, which is missing beside it")
    return WeightFiles(files, {tensor: index.parent / name for tensor, name in promised.items()}, index=index)


def _unreadable(file: Path) -> str:
    """What to do with a file that is not read."""
    if file.suffix.lower() in _PICKLES:
        return (
            f"{file}: is a pickle, which runs code when it is read, and Octavo reads none; load it yourself with "
            f"model.load_state_dict(torch.load({file.name!r}, weights_only=True)) and pass the module: "
            "octavo.compress(model, ...)"
        )
    return f"{file}: only .safetensors files, their .index.json and .gguf files can be read (pickles run code)"


def _nothing(folder: Path) -> str:
    """What to do with a folder that holds no weights to be read."""
    adapters = sorted(folder.glob("adapter_model*.safetensors"))
    if adapters:
        return (
            f"{folder}: holds an adapter ({adapters[0].name}) and not the model that it adapts; merge it into that "
            "model with merge_and_unload and save the whole"
        )
    text = f"{folder}: no .safetensors file in this folder; save the model with save_pretrained first"
    pickles = sorted(file for file in folder.iterdir() if file.is_file() and file.name.lower().endswith(_PICKLES))
    if not pickles:
        return text
    if (folder / "config.json").exists():
        return f"{text} ({pickles[0].name} is a pickle: from_pretrained loads it, and Octavo does not)"
    return (
        f"{text}. {_unreadable(pickles[0]).partition(': ')[2].replace('is a pickle', f'{pickles[0].name} is a pickle')}"
    )


def _listed(files: Sequence[Path]) -> str:
    return ", ".join(file.name for file in files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
