"""Finding the weight files of a folder: exactly those that ``from_pretrained`` would load."""

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

#: Suffixes of weight files of any format.
_ENDINGS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".onnx", ".onnx_data",
    ".onnx.data", ".gguf", ".ggml", ".npz", ".npy", ".ot", ".pb", ".tflite", ".nemo", ".mlmodel", ".keras", ".joblib",
)  # fmt: skip
_INDEX = re.compile(r".*\.index(\..+)?\.json")
#: Formats whose readers run code from the file.
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors")
#: Names of the same weights in another precision, for ``from_pretrained(variant=...)``.
_VARIANT = re.compile(r"model\..+\.safetensors")
_ADAPTER = re.compile(r"adapter_model.*\.safetensors")
#: The files of an adapter of ``peft``.
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: The key of ``config.json`` that names the weight file.
NAMED = "transformers_weights"
#: Depth of sub-folders that are searched.
_DEEP = 3


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a source.

    Parameters
    ----------
    promised
        The file of each tensor according to the index, if there is one.
    usual
        Whether ``from_pretrained`` finds them.
    index
        The index file.
    """

    files: list[Path]
    promised: dict[str, Path] = field(default_factory=dict)
    usual: bool = True
    index: Path | None = None


def is_weights(name: str) -> bool:
    """Whether a file with that name holds weights or is an index of weight files."""
    return name.lower().endswith(_ENDINGS) or _INDEX.fullmatch(name.lower()) is not None


def weight_files(path: Path) -> WeightFiles:
    """Find the weight files of a file, an index or a folder, with the preferences of ``transformers``.

    The order is ``transformers_weights`` in ``config.json``, ``model.safetensors``, then the shards named by
    ``model.safetensors.index.json``. Otherwise complete shards without an index are used, or the only other file. A
    folder without ``config.json`` may hold several files. An adapter is used only if the folder is one of ``peft`` and
    holds no model, and variants such as
    ``model.fp16.safetensors`` only if there is nothing else.

    Raises
    ------
    RequestError
        If there are none or several candidates, or a shard is missing.
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
    if is_adapter(path):
        return WeightFiles([path / ADAPTER_WEIGHTS])
    return replace(_others(path), usual=False)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter of ``peft`` alone, and no model."""
    alone = not (folder / "config.json").exists() and not (folder / "modules.json").exists()
    return alone and (folder / ADAPTER_CONFIG).is_file() and (folder / ADAPTER_WEIGHTS).is_file()


def _named(folder: Path) -> Path | None:
    """The file named in the config, which has priority over all others."""
    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8"))[NAMED]
        inside = (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        # A damaged config is reported when the model is built.
        return None
    return folder / name if inside and name.endswith((".safetensors", ".safetensors.index.json")) else None


def beside(folder: Path, counted: Collection[Path]) -> list[str]:
    """Names of all other weight files in a folder and its sub-folders."""
    return [file.relative_to(folder).as_posix() for file in _walk(folder) if file not in counted]


def _walk(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        depth = len(Path(place).relative_to(folder).parts)
        if depth and JOB in names:
            # Kept work of a run does not count as weights.
            folders.clear()
            continue
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if depth + 1 < _DEEP else []
        yield from (Path(place, name) for name in sorted(names) if is_weights(name) and not name.startswith("."))


def _others(folder: Path) -> WeightFiles:
    """Weights with names that ``from_pretrained`` does not look for."""
    files = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    files = [file for file in files if not _ADAPTER.fullmatch(file.name)]
    # Variants are only used if there is nothing else.
    files = [file for file in files if not _VARIANT.fullmatch(file.name)] or files
    if not files and not indexes:
        raise RequestError(_nothing(folder))
    pickled = [name for name in ("pytorch_model.bin", "pytorch_model.bin.index.json") if (folder / name).is_file()]
    is_model = (folder / "config.json").exists()
    if pickled and is_model:
        raise RequestError(
            f"{folder}: from_pretrained loads {pickled[0]} here and not {(indexes or files)[0].name}; load the model "
            "and write it with save_pretrained, or name the .safetensors file as the source"
        )
    shards = _shards(files)
    if "model" in shards:
        return WeightFiles(shards["model"])
    if len(indexes) > 1:
        raise RequestError(f"{folder}: holds several indexes; name one of them as the source: {_listed(indexes)}")
    if indexes:
        return _indexed(indexes[0])
    if is_model and len(files) > 1 and len(shards) != 1:
        raise RequestError(
            f"{folder}: holds several possible weight files ({_listed(files)}), but no model.safetensors; name one of "
            "them as the source, or rename it"
        )
    return WeightFiles(next(iter(shards.values())) if is_model and shards else files)


def _shards(files: Sequence[Path]) -> dict[str, list[Path]]:
    """Complete sets of shards, by name prefix."""
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
        # Counting stops at the first missing shard, whatever number a name claims.
        for number in range(1, int(count) + 1):
            name = f"{stem}-{number:0{width}}-of-{count}.safetensors"
            if parts[0].with_name(name) not in parts:
                raise RequestError(
                    f"{parts[0].parent}: holds {parts[0].name}, but shard {name} is missing; copy it and the index "
                    "there"
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
        raise RequestError(f"{index}: not an index of safetensors shards: {error}; copy it again") from error
    if not all(isinstance(name, str) for name in promised.values()):
        raise RequestError(
            f"{index}: not an index of safetensors shards: a shard's name is not a string; copy it again"
        )
    files = [index.parent / name for name in sorted(set(promised.values()))]
    for file in files:
        if not checked(file).exists():
            raise RequestError(f"{index}: names the shard {file.name}, which is missing; copy it there")
    return WeightFiles(files, {tensor: index.parent / name for tensor, name in promised.items()}, index=index)


def _unreadable(file: Path) -> str:
    """The message for a file of an unsupported format."""
    if file.suffix.lower() in _PICKLES:
        return (
            f"{file}: is a pickle, which can run code when loaded, so Octavo does not read it; load it yourself with "
            f"model.load_state_dict(torch.load({file.name!r}, weights_only=True)) and pass the module: "
            "octavo.compress(model, ...)"
        )
    return f"{file}: unsupported format; give a .safetensors file, its .index.json or a .gguf file"


def _nothing(folder: Path) -> str:
    """The message for a folder without readable weights."""
    adapters = sorted(folder.glob("adapter_model*.safetensors"))
    if adapters:
        return (
            f"{folder}: holds only an adapter ({adapters[0].name}); merge it into its model with merge_and_unload and "
            "save that"
        )
    text = f"{folder}: holds no .safetensors file; save the model with save_pretrained first"
    pickles = sorted(file for file in folder.iterdir() if file.is_file() and file.name.lower().endswith(_PICKLES))
    if not pickles:
        return text
    if (folder / "config.json").exists():
        return f"{text} ({pickles[0].name} is a pickle: from_pretrained loads it, but Octavo does not)"
    return (
        f"{text}. {_unreadable(pickles[0]).partition(': ')[2].replace('is a pickle', f'{pickles[0].name} is a pickle')}"
    )


def _listed(files: Sequence[Path]) -> str:
    return ", ".join(file.name for file in files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
