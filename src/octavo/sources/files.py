"""Sources from files: ``transformers`` folders, safetensors in one file or in shards, GGUF."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from octavo.errors import RequestError
from octavo.sources.encoders import bind_encoder, is_installed, load_encoder
from octavo.sources.gguf import gguf_file, open_gguf
from octavo.sources.model_classes import read_config
from octavo.sources.prequantized import write_floats
from octavo.sources.sentences import members, transformer_folder, weight_folders
from octavo.sources.skeletons import attach_module
from octavo.sources.source import DTYPES, SMALLEST_SITE, Source, StepProgress, examine
from octavo.sources.weight_files import beside, weight_files
from octavo.system.paths import checked
from octavo.system.temporary import TemporaryFolder
from octavo.system.tensor_files import Place, offsets


def from_path(path: str | Path, *, module: bool = True, progress: StepProgress = lambda done, total: None) -> Source:
    """Open a ``transformers`` folder, a ``.safetensors`` file, a sharded index, or a GGUF file.

    Parameters
    ----------
    module
        Whether the model of a ``transformers`` folder will be run. Otherwise only tensors are read, one at a time.
    progress
        Called with the number of tensors examined and their total.

    Raises
    ------
    RequestError
        If the path does not exist, or a file is truncated, is not safetensors, or holds NaN or Inf.
    """
    # A relative path changes meaning with the working folder, and "." is not a title.
    path = Path(os.path.abspath(checked(path)))
    if not path.exists():
        raise RequestError(f"{path}: no such file or folder; check the path")
    quantized = gguf_file(path)
    if quantized is not None:
        return open_gguf(quantized)
    files, promised, indexes = [], dict[str, Path](), list[Path]()
    strange: list[str] = []
    for prefix, folder in weight_folders(path):
        found = weight_files(folder)
        files += [(prefix, file) for file in found.files]
        promised.update((prefix + name, file) for name, file in found.promised.items())
        indexes += [found.index] if found.index else []
        strange += [] if found.usual else [file.name for file in found.files]
    inner = transformer_folder(path)
    config = inner / "config.json" if inner.is_dir() else None
    how = read_config(inner).get("quantization_config") if config is not None and config.exists() else None
    if how and (inner != path or not isinstance(how, dict) or how.get("quant_method") == "octavo"):
        raise RequestError(f"{config}: this model is already compressed; give the original folder instead")
    source = _from_files(path, files, promised)
    if how:
        return _in_floats(source, path, module=module, progress=progress)
    if path.is_dir():
        left = beside(path, [*(file for _, file in files), *indexes])
        source.notes += [f"not counted and not read: {', '.join(left)}"] if left else []
    examine(source, progress)
    for alias, name in list(_equal_tensors(source)):
        source.aliases[alias] = name
        del source.shapes[alias], source.dtypes[alias]
    if config is not None and config.exists():
        source.is_transformers = True
        if module and strange:
            source.notes.append(
                f"from_pretrained does not find {', '.join(strange)}, as it is not named model.safetensors and there "
                "is no index: the tensors are compressed without data, and the model is not run"
            )
        elif module:
            attach_module(source, inner)
    elif module and path.is_dir() and members(path) and is_installed():
        # An encoder without a transformers model is small.
        encoder = load_encoder(path)
        source.module, source.is_encoder = encoder, True
        bind_encoder(source, encoder, path)
    return source


def _in_floats(quantized: Source, path: Path, *, module: bool, progress: StepProgress) -> Source:
    """The source of a quantized folder: its model in floats, in a temporary folder that lives as long as the source."""
    place = TemporaryFolder("octavo-floats-")
    stored = write_floats(quantized, path, place.path)
    source = from_path(place.path, module=module, progress=progress)
    source.temporary += (place,)
    source.title, source.stored = quantized.title, stored
    types = ", ".join(f"{kind} {size / 1e6:.2f} MB" for kind, size in stored.items())
    source.notes.append(
        f"the source is already quantized ({types}): ratios are relative to these bytes; as floats it takes "
        f"{source.dense_bytes / 1e6:.2f} MB"
    )
    return source


def _from_files(path: Path, files: list[tuple[str, Path]], promised: Mapping[str, Path]) -> Source:
    """A source from files, each with the prefix of its tensor names in the source."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    where: dict[str, Path] = {}
    places: dict[str, Place] = {}
    for prefix, file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                starts = offsets(file)
                for key in handle.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
                    name, tensor = prefix + key, handle.get_slice(key)
                    if name in where:
                        raise RequestError(
                            f"{path}: tensor {name!r} is in {where[name].name} and in {file.name}; remove one of them, "
                            "or name one file as the source"
                        )
                    shapes[name], where[name] = tuple(tensor.get_shape()), file
                    dtypes[name] = DTYPES.get(tensor.get_dtype(), torch.uint8)
                    if tensor.get_dtype() not in DTYPES:
                        raise RequestError(
                            f"{file}: tensor {name!r} has dtype {tensor.get_dtype()}, which is not supported; convert "
                            "it to floats"
                        )
                    places[name] = Place(file, starts[key], dtypes[name], shapes[name])
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise RequestError(
                f"{file}: cannot be read as safetensors, it may be truncated: {error}; copy it again"
            ) from error
    for name, file in promised.items():
        if where.get(name) != file:
            raise RequestError(
                f"{file}: this shard lacks tensor {name!r}, which the index places in it; shard and index do not "
                "belong together, so copy both again"
            )
    if not shapes:
        raise RequestError(f"{path}: holds no tensors; name a file with weights")

    def read(name: str) -> Tensor:
        return places[name].tensor()

    return Source(path.stem if path.is_file() else path.name, path, shapes, dtypes, {}, read)


def _equal_tensors(source: Source) -> Iterator[tuple[str, str]]:
    """Find weights stored twice with equal content, such as an embedding and its tied head."""
    first: dict[tuple, str] = {}
    for name, shape in source.shapes.items():
        if len(shape) >= 2 and math.prod(shape) >= SMALLEST_SITE:
            known = first.setdefault((shape, source.dtypes[name], source.digests[name]), name)
            if known != name:
                yield name, known
