"""Block types of ggml against the decoder of the ``gguf`` package, and against llama.cpp's own encoder."""

import ctypes

import numpy as np
import pytest
import torch

from octavo.calibration.evidence import Evidence
from octavo.coding.ggml import TYPES, BlockType, Fields
from octavo.errors import ArtifactError
from octavo.forms import restore
from octavo.methods import get_method

gguf = pytest.importorskip("gguf")
WITHOUT = "pip install llama-cpp-python compares with llama.cpp itself"
KINDS = pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)
ROWS, COLUMNS = 6, 512


def any_fields(kind: BlockType, seed: int = 0) -> Fields:
    """Fields that use all bits of a type."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 256, (ROWS, kind.row_bytes(COLUMNS)), generator=generator, dtype=torch.uint8)
    found = kind.unpacked(bits)
    blocks = (ROWS, COLUMNS // kind.block)
    d, base = (torch.randn(blocks, generator=generator).half() for _ in range(2))
    return Fields(found.codes, d, base if kind.offset else None, found.scales, found.minima)


@KINDS
def test_blocks_are_what_the_package_reads(kind: BlockType) -> None:
    number = gguf.GGMLQuantizationType(kind.number)
    assert number.name.lower() == kind.name and gguf.GGML_QUANT_SIZES[number] == (kind.block, kind.bytes)
    blocks = kind.packed(any_fields(kind))
    assert np.array_equal(gguf.dequantize(blocks.numpy(), number), kind.dense(blocks).numpy())


@KINDS
def test_fields_come_back_from_their_bytes(kind: BlockType) -> None:
    fields = any_fields(kind, seed=1)
    for before, after in zip(vars(fields).values(), vars(kind.unpacked(kind.packed(fields))).values(), strict=True):
        assert (before is None and after is None) or torch.equal(before, after)


@KINDS
def test_a_damaged_block_is_refused(kind: BlockType) -> None:
    blocks = kind.packed(any_fields(kind))
    fields = kind.unpacked(blocks)
    fields.d[0, 0] = torch.nan
    meta = {"form": "ggml", "kind": kind.name, "columns": COLUMNS}
    for damaged in (kind.packed(fields), blocks[:, :-1], blocks.short()):
        with pytest.raises(ArtifactError):
            restore({"blocks": damaged}, meta, (ROWS, COLUMNS))
    with pytest.raises(ArtifactError, match="not a block type"):
        restore({"blocks": blocks}, {**meta, "kind": "q9_k"}, (ROWS, COLUMNS))


def seen() -> tuple[torch.Tensor, Evidence]:
    """A matrix and the second moment of inputs that depend on each other."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(64, COLUMNS, generator=generator) * torch.rand(64, 1, generator=generator)
    inputs = torch.randn(4 * COLUMNS, COLUMNS, generator=generator)
    inputs = inputs + inputs.roll(1, 1) * 0.7
    inputs *= torch.rand(COLUMNS, generator=generator) * 2
    return weight, Evidence(torch.ones(64), inputs.T @ inputs / len(inputs) + 1e-3 * torch.eye(COLUMNS))


def encoded(kind: BlockType, feedback: bool = True) -> torch.Tensor:
    weight, evidence = seen()
    return get_method(f"ggml:feedback={str(feedback).lower()}").encode(weight, {"type": kind.name}, evidence).dense()


@KINDS
def test_feedback_lowers_the_loss_of_every_type(kind: BlockType) -> None:
    weight, evidence = seen()
    with_feedback, without = (evidence.loss(encoded(kind, feedback) - weight) for feedback in (True, False))
    assert with_feedback < 0.8 * without


@KINDS
def test_steps_are_as_good_as_llama_cpps_own(kind: BlockType) -> None:
    """Without error feedback the loss is near that of llama.cpp's encoder with the same importance matrix."""
    package = pytest.importorskip("llama_cpp", reason=WITHOUT, exc_type=Exception)
    weight, evidence = seen()
    rows, columns = weight.shape
    quantize = ctypes.CDLL(package.llama_cpp._lib._name).ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    place, length = ctypes.c_void_p, ctypes.c_int64
    quantize.argtypes = [ctypes.c_int, place, place, length, length, length, place]
    content, importance = weight.contiguous().numpy(), evidence.columns.diagonal().contiguous().numpy()
    blocks = np.zeros((rows, kind.row_bytes(columns)), np.uint8)
    quantize(kind.number, content.ctypes.data, blocks.ctypes.data, 0, rows, columns, importance.ctypes.data)
    plain = Evidence(evidence.rows, torch.diag(evidence.columns.diagonal()))
    theirs = plain.loss(kind.dense(torch.from_numpy(blocks)) - weight)
    assert plain.loss(encoded(kind, feedback=False) - weight) < 1.1 * theirs


def test_a_zero_row_stays_zero() -> None:
    weight, evidence = seen()
    weight[::2] = 0
    for kind in TYPES.values():
        form = get_method("ggml").encode(weight, {"type": kind.name}, evidence)
        assert not form.dense()[::2].any(), kind.name
