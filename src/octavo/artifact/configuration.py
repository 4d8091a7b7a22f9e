"""Checks of an artifact's configuration files, before any loader reads them.

They are JSON files that determine which model is built and by which class. The manifest holds their checksums, so a
changed file is reported by name. But an attacker can write any checksum, so dangerous entries are refused whatever the
manifest says.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from octavo.artifact.packing import DTYPES, dtype_name
from octavo.errors import ArtifactError
from octavo.sources.counts import check_counts, entries
from octavo.sources.narrowing import FLOATS
from octavo.system.strict_json import parse_object, read_plain

CONFIG = "config.json"
#: Names of the files that determine which model is built, in the artifact's folder or one folder deeper.
_NAMES = re.compile(
    r"([\w.-]+/)?(config|generation_config|adapter_config|modules|sentence_\w+_config|config_sentence_transformers)\.json",
    re.ASCII,
)
#: Largest size of such a file in bytes.
_MOST = 16 << 20
_DTYPES = {*DTYPES, *map(dtype_name, FLOATS), "auto"}


def is_configuration(name: str) -> bool:
    """Whether the file at this relative path determines which model is built."""
    return _NAMES.fullmatch(name) is not None


def listed(contents: Mapping[str, bytes]) -> dict[str, list[int]]:
    """The manifest's record of configuration files: bytes and CRC-32."""
    return {name: [len(content), zlib.crc32(content)] for name, content in sorted(contents.items())}


def changes(folder: Path, recorded: Mapping[str, Any]) -> list[str]:
    """Configuration files that differ from the manifest, each with the kind of change.

    Raises
    ------
    ArtifactError
        If one of them is not a regular file, or is too large.
    """
    present = {
        name: read_plain(file, most=_MOST)
        for file in (*folder.glob("*.json"), *folder.glob("*/*.json"))
        if is_configuration(name := file.relative_to(folder).as_posix())
    }
    found = listed(present)
    said = [f"{name} is missing" for name in recorded if name not in found]
    said += [f"{name} was changed" for name in recorded if name in found and found[name] != recorded[name]]
    return said + [f"{name} was added" for name in found if name not in recorded]


def check_config(file: Path, shapes: Collection[tuple[int, ...]], *, plain: bool = False) -> dict[str, Any]:
    """Read the ``config.json`` of an artifact's model and refuse dangerous entries.

    Parameters
    ----------
    shapes
        Shapes of the artifact's tensors.
    plain
        Whether the artifact's tensors are stored as every loader reads them, so that the config need not name Octavo.

    Raises
    ------
    ArtifactError
        If it is malformed, or names other weights, code, or more parts than the tensors can fill.
    """
    config = parse_object(read_plain(file, most=_MOST), file)
    method = config.get("quantization_config", {"quant_method": "octavo"} if plain else None)
    if (
        not isinstance(method, dict)
        or method.get("quant_method") != "octavo"
        or set(method) - {"quant_method", "packed"}
    ):
        raise ArtifactError(
            f'{file}: quantization_config is {str(method)[:80]}, not {{"quant_method": "octavo"}}; other loaders would '
            "take the packed bytes for weights, copy the artifact again"
        )
    if not isinstance(method.get("packed", False), bool):
        raise ArtifactError(f"{file}: packed is {str(method['packed'])[:80]}; it must be true or false")
    if "transformers_weights" in config:
        raise ArtifactError(f"{file}: transformers_weights names other weights than the artifact's; remove the entry")
    classes = config.get("architectures")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise ArtifactError(f"{file}: architectures is {str(classes)[:80]}; it must be a list of class names")
    if not isinstance(config.get("model_type", ""), str):
        raise ArtifactError(f"{file}: model_type is {str(config['model_type'])[:80]}; it must be a name")
    for key, value in entries(config):
        _check_entry(file, key, value)
    check_counts(file, config, shapes, ArtifactError)
    return config


def check_options(file: Path, shapes: Collection[tuple[int, ...]]) -> None:
    """Refuse loader options of an encoder module that name code, other weights, or too many parts.

    Raises
    ------
    ArtifactError
        If an option does.
    """
    options = parse_object(read_plain(file, most=_MOST), file)
    for key, value in entries(options):
        if key in ("transformers_weights", "quantization_config"):
            raise ArtifactError(f"{file}: {key} would make the loader read other weights; remove the entry")
        _check_entry(file, key, value)
    check_counts(file, options, shapes, ArtifactError)


def _check_entry(file: Path, key: str, value: Any) -> None:
    if key.strip("_").startswith(("attn_implementation", "experts_implementation")) and "/" in str(value):
        raise ArtifactError(
            f"{file}: {key} names the kernel {str(value)[:80]}, which would be downloaded code; remove the entry"
        )
    # Parts of a model may have separate entries.
    known = value is None or isinstance(value, dict) or (isinstance(value, str) and value in _DTYPES)
    if key in ("dtype", "torch_dtype") and not known:
        raise ArtifactError(f"{file}: {key} is {str(value)[:80]}; it must be the name of a floating dtype")
