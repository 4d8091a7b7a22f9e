"""GGUF files as sources, read through ``transformers``: dequantized weights and their size in the file.

Its readers trust the file and may raise any exception, so every exception means an unreadable file.
"""

from __future__ import annotations

import importlib.util
import io
import shutil
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import nn

from octavo.errors import MissingExtraError, RequestError
from octavo.sources.bounded import bounded
from octavo.sources.source import Source, from_module
from octavo.system.temporary import TemporaryFolder


def gguf_file(path: Path) -> Path | None:
    """The GGUF file at ``path``, or the only one in a folder without safetensors; None if there is none.

    Raises
    ------
    RequestError
        If a folder holds several.
    """
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    files = [] if any(path.glob("*.safetensors*")) else sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise RequestError(
            f"{path}: holds {len(files)} GGUF files; name one of them, such as {files[0].name} or {files[1].name}"
        )
    return files[0] if files else None


def open_gguf(file: Path) -> Source:
    """A source from a GGUF file: the float32 model that ``transformers`` loads from it.

    Its original bytes are those of the tensors in the file. Configuration and tokenizer, also from the file, are
    written to a temporary folder that exists as long as the source.

    Raises
    ------
    RequestError
        If the file is damaged, lacks weights of its model, or has a type that ``transformers`` cannot read.
    MissingExtraError
        If the packages for reading it are not installed.
    """
    if not all(map(_installed, ("transformers", "gguf", "accelerate"))):
        raise MissingExtraError(
            f"{file}: reading GGUF needs transformers, gguf and accelerate: pip install 'octavo[gguf]'"
        )
    tensors = _tensors(file)
    module = _model(file, [int(tensor.n_elements) for tensor in tensors])
    stored = _stored(tensors)
    source = from_module(module, title=file.stem)
    source.path, source.is_transformers, source.stored = file, True, stored
    types = ", ".join(f"{kind} {size / 1e6:.2f} MB" for kind, size in stored.items())
    source.notes.append(
        f"the source is already quantized ({types}): ratios are relative to these bytes; as floats it takes "
        f"{source.dense_bytes / 1e6:.2f} MB"
    )
    folder = TemporaryFolder("octavo-gguf-")
    source.temporary += (folder,)
    source.companions = folder.path
    _write_companions(file, module, source.companions)
    return source


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # a blocked module has no specification
        return False


def _tensors(file: Path) -> list[Any]:
    """The tensors of the mapped file."""
    from gguf import GGUFReader

    try:
        tensors = list(GGUFReader(file).tensors)
    except Exception as error:
        raise RequestError(f"{file}: cannot be read as GGUF, it may be truncated: {error}; copy it again") from error
    if not tensors:
        raise RequestError(f"{file}: holds no tensors; name a file with weights")
    return tensors


def _stored(tensors: list[Any]) -> dict[str, int]:
    """Bytes of tensors by type, largest first."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(tensor.n_bytes)
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def _model(file: Path, elements: list[int]) -> nn.Module:
    """The model of a file with the given tensor sizes. Parts that its header omits get default sizes."""
    import transformers

    try:
        # Its progress bars cannot be turned off.
        with redirect_stderr(io.StringIO()), bounded(len(elements), sum(elements)):
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
    except Exception as error:
        raise RequestError(f"{file}: transformers cannot load it: {error}; give the original folder instead") from error
    module, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise RequestError(
            f"{file}: lacks {len(missing)} weights of {type(module).__name__}, such as {missing[0]!r}; copy it again"
        )
    return module.eval()


def write_floats(file: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write the model of a GGUF file as a folder of plain floats, with its configuration and tokenizer.

    Errors are those of :func:`open_gguf`.
    """
    source: Any = open_gguf(file)
    # Loaders keep some weights packed, and refuse to write them; a new model has none that are.
    model = type(source.module)(source.module.config)
    model.load_state_dict(source.module.state_dict())
    model.tie_weights()
    shutil.copytree(source.companions, folder, dirs_exist_ok=True)
    model.to(dtype).save_pretrained(folder)


def _write_companions(file: Path, module: Any, folder: Path) -> None:
    """Write the configuration and tokenizer needed to load the model without the file."""
    import transformers

    config = module.config
    # The weights are returned dense, so loaders must not treat them as GGUF again.
    config.__dict__.pop("quantization_config", None)
    config.architectures = [type(module).__name__]
    config.save_pretrained(folder)
    if module.generation_config is not None:
        module.generation_config.save_pretrained(folder)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
        tokenizer.save_pretrained(folder)
    except Exception as error:
        raise RequestError(f"{file}: its tokenizer cannot be read: {error}; copy it again") from error
