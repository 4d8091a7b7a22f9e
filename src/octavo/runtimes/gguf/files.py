"""GGUF files, written tensor by tensor."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from octavo.coding.ggml import TYPES, StoredBlocks
from octavo.errors import ArtifactError
from octavo.forms import Dense, Form
from octavo.forms.ggml import GgmlBlocks
from octavo.runtimes.gguf.architectures import Laid, require_gguf
from octavo.runtimes.gguf.vocabulary import add_vocabulary, copy_metadata
from octavo.sources.source import Source

#: Bytes to which every tensor of a file is padded.
_ALIGNED = 32
_FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}


@dataclass(frozen=True)
class Outlined:
    """A tensor of a file before its content is known.

    Parameters
    ----------
    name
        Its name in the file.
    shape
        Its shape, rows first.
    kind
        Number of its type.
    """

    name: str
    shape: tuple[int, ...]
    kind: int


def aligned(size: int) -> int:
    """Bytes with padding."""
    return -(-size // _ALIGNED) * _ALIGNED


def form_bytes(form: Form, rows: int) -> int:
    """Bytes that a form of so many rows takes in a file, with padding."""
    if isinstance(form, GgmlBlocks):
        return aligned(rows * form.blocks.shape[1])
    assert isinstance(form, Dense)
    return aligned(rows * form.shape[1] * form.weight.element_size())


def kind_of(form: Form) -> int:
    """The number of a form's type."""
    if isinstance(form, GgmlBlocks):
        return TYPES[form.kind].number
    assert isinstance(form, Dense)
    return _FLOATS[form.weight.dtype]


def gains(form: Form) -> int:
    """Factors of a row that :func:`scaled` takes: one for each of its blocks."""
    return form.columns // TYPES[form.kind].block if isinstance(form, GgmlBlocks) else 1


def scaled(form: Form, factors: Tensor) -> Form:
    """A form with its blocks multiplied by factors (rows, blocks); floats stay as they are."""
    return form.scaled(factors) if isinstance(form, GgmlBlocks) else form


def raw(form: Form, rows: Tensor) -> np.ndarray[Any, Any]:
    """A form's bytes (rows, bytes of a row) in the order of ``rows``."""
    assert isinstance(form, GgmlBlocks | Dense)
    content = form.blocks if isinstance(form, GgmlBlocks) else form.weight.contiguous().view(torch.uint8)
    return content[rows].contiguous().numpy()


def header_bytes(source: Source, laid: Laid, tensors: Iterable[Outlined]) -> int:
    """Bytes of a file before its tensors, with padding; the types of tensors do not change it."""
    with tempfile.TemporaryDirectory(prefix="octavo-") as folder:
        file = Path(folder) / "head.gguf"
        _begun(file, source, laid, tensors).close()
        return aligned(file.stat().st_size)


def write_file(file: Path, source: Source, laid: Laid, tensors: Mapping[Outlined, Any]) -> None:
    """Write a file; ``tensors`` gives the bytes of every tensor when it is called.

    It is flushed to the disk.
    """
    writer = _begun(file, source, laid, tensors)
    for content in tensors.values():
        writer.write_tensor_data(content())
    writer.close()
    with open(file, "rb") as done:
        os.fsync(done.fileno())


def stored_blocks(file: Path) -> dict[str, StoredBlocks]:
    """Where a file holds its tensors, by their names in it; those of other types than Octavo's are left out."""
    names = {kind.number: kind.name for kind in TYPES.values()}
    return {
        tensor.name: StoredBlocks(file, int(tensor.data_offset), names[int(tensor.tensor_type)])
        for tensor in require_gguf().GGUFReader(file).tensors
        if int(tensor.tensor_type) in names
    }


def read_file(file: Path) -> dict[str, tuple[int, np.ndarray[Any, Any]]]:
    """Type and mapped bytes of every tensor of a file.

    Raises
    ------
    ArtifactError
        If it cannot be read.
    """
    try:
        tensors = require_gguf().GGUFReader(file).tensors
    except Exception as error:
        raise ArtifactError(f"{file}: cannot be read as GGUF: {error}; write it again") from error
    return {tensor.name: (int(tensor.tensor_type), tensor.data.view(np.uint8)) for tensor in tensors}


def _begun(file: Path, source: Source, laid: Laid, tensors: Iterable[Outlined]) -> Any:
    """A writer that has written everything but the content of tensors."""
    gguf = require_gguf()
    writer = gguf.GGUFWriter(file, laid.architecture.name)
    if source.path is not None and source.path.suffix == ".gguf":
        copy_metadata(writer, source.path)
    else:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(source.title)
        laid.metadata(writer)
        assert source.folder is not None
        add_vocabulary(writer, source.folder, int(laid.config["vocab_size"]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_quantized_by("octavo")
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType(tensor.kind)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        count = int(np.prod(tensor.shape, dtype=np.int64)) // block * size
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), count, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer
