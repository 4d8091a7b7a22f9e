"""Model folders whose weights another tool quantized: the same model in floats, which the rest of Octavo reads.

Its grids are found again from the floats (:mod:`octavo.methods.quantize.grids`), so that codes are kept where the
budget allows it. Ratios are relative to the bytes that the quantizer stored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from octavo.errors import RequestError
from octavo.sources.coded_weights import CodedWeight, coded_weights, is_dropped
from octavo.sources.companions import copy_companions
from octavo.sources.model_classes import read_config
from octavo.sources.source import Source

#: Bytes of a file of floats.
_SHARD = 1 << 30
#: Files of quantizers that repeat the configuration.
_REPEATED = ("quantize_config.json", "quant_config.json")


def write_floats(source: Source, folder: Path, place: Path) -> dict[str, int]:
    """Write the model of a quantized folder in floats, one weight in memory at a time.

    Parameters
    ----------
    source
        The tensors of the folder as they are stored.
    folder
        The folder with its ``config.json``.
    place
        An empty folder for the floats, the configuration and the tokenizer.

    Returns
    -------
    The stored bytes by the name of the quantizer or of a dtype, largest first.

    Raises
    ------
    RequestError
        If the format is not read, or the tensors do not fit together; the error names the first.
    """
    config = read_config(folder)
    how = config.pop("quantization_config")
    try:
        weights = coded_weights(source.dtypes, how)
    except RequestError as error:
        raise RequestError(
            f"{folder / 'config.json'}: the model is {error}; give the original folder, or load the model, convert its "
            "weights to floats, and pass the module"
        ) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RequestError(
            f"{folder / 'config.json'}: quantization_config cannot be read ({type(error).__name__}: {error}); copy it "
            "again"
        ) from error
    copy_companions(folder, place)
    for name in _REPEATED:
        (place / name).unlink(missing_ok=True)
    (place / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    _write(place, _floats(source, folder, weights))
    parts = {part for weight in weights for part in weight.parts.values()}
    sizes: dict[str, int] = {}
    for name, shape in source.shapes.items():
        dtype = source.dtypes[name]
        kind = str(how["quant_method"]) if name in parts else str(dtype).removeprefix("torch.")
        sizes[kind] = sizes.get(kind, 0) + torch.Size(shape).numel() * dtype.itemsize
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def _floats(source: Source, folder: Path, weights: list[CodedWeight]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the model in floats."""
    parts = {part for weight in weights for part in weight.parts.values()}
    for name in source.shapes:
        if name not in parts and not is_dropped(name):
            yield name, source.read(name)
    for weight in weights:
        try:
            yield weight.name, weight.decode({part: source.read(name) for part, name in weight.parts.items()})
        except RequestError as error:
            raise RequestError(f"{folder}: {weight.name!r} {error}; give the original folder") from error
        except (
            LookupError,
            ValueError,
            RuntimeError,
            ArithmeticError,
            StopIteration,
            TypeError,
            AttributeError,
        ) as error:
            raise RequestError(
                f"{folder}: the parts of {weight.name!r} do not fit together ({type(error).__name__}: {error}); copy "
                "the folder again"
            ) from error


def _write(place: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Files of floats, with an index if there are several."""
    waiting: dict[str, Tensor] = {}
    held: dict[str, str] = {}
    size = 0

    def flush() -> None:
        file = f"model-{len(set(held.values())) + 1:05d}.safetensors"
        save_file(waiting, place / file, metadata={"format": "pt"})
        held.update(dict.fromkeys(waiting, file))
        waiting.clear()

    for name, tensor in tensors:
        waiting[name] = tensor.contiguous()
        size += tensor.nbytes
        if size >= _SHARD:
            flush()
            size = 0
    if waiting:
        flush()
    index: Mapping[str, Any] = {"metadata": {}, "weight_map": held}
    (place / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
