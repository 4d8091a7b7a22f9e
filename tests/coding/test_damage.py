"""No blob, damaged or malicious, does anything but raise ArtifactError."""

import resource
import struct
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
import torch

from octavo.calibration.evidence import Evidence
from octavo.coding import Allowance, decode, describe, encode, huffman
from octavo.coding.container import CHUNK, assemble
from octavo.coding.fields import Writer
from octavo.coding.packed import SPLIT
from octavo.coding.radix import RadixWindow
from octavo.errors import ArtifactError
from octavo.forms.trellis import QUANTIZERS
from octavo.methods import get_method


def _samples() -> dict[str, bytes]:
    generator = np.random.default_rng(0)
    rows = np.exp(generator.standard_normal((140, 1)))
    small = generator.laplace(size=(140, 120)) * rows
    large = generator.laplace(size=(700, 120)) * np.exp(generator.standard_normal((700, 1)))
    large[3, 4] = 30000
    tensors = {
        "raw": torch.from_numpy(generator.integers(-128, 128, 60).astype(np.int8)),
        "bits": torch.from_numpy(generator.integers(0, 5, (6, 10))) > 3,
        "ans": torch.from_numpy(np.rint(small).astype(np.int16)),
        "huffman": torch.from_numpy(np.rint(large * 3).astype(np.int32)),
    }
    found = {codec: encode(tensor) for codec, tensor in tensors.items()}
    # Both tables and streams of codes of a trellis are split.
    weight, plain = torch.from_numpy(small).float(), Evidence(torch.ones(len(small)), None)
    codes = get_method("trellis").encode(weight, {"step": 2.0}, plain).tensors()["grid/codes"]
    found["ans, split"] = encode(codes, QUANTIZERS)
    assert len(found["ans, split"]) < len(encode(codes))
    return found


SAMPLES = _samples()


def reseal(blob: bytearray) -> bytes:
    """Give a damaged blob the checksums of a sound one, as an attacker would."""
    head_bytes = struct.unpack_from("<I", blob, 4)[0]
    if 12 <= head_bytes <= len(blob):
        checksum = zlib.crc32(blob[12:head_bytes], zlib.crc32(blob[:8]))
        struct.pack_into("<I", blob, 8, checksum)
    return bytes(blob)


@pytest.mark.parametrize("codec", SAMPLES)
def test_every_flipped_byte_is_noticed(codec: str) -> None:
    blob = SAMPLES[codec]
    assert describe(blob).codec == codec.partition(",")[0]
    generator = np.random.default_rng(1)
    places = set(range(min(300, len(blob)))) | set(generator.integers(0, len(blob), 300).tolist())
    for place in places:
        damaged = bytearray(blob)
        damaged[place] ^= int(generator.integers(1, 256))
        with pytest.raises(ArtifactError):
            decode(bytes(damaged))


@pytest.mark.parametrize("codec", SAMPLES)
def test_every_truncation_is_noticed(codec: str) -> None:
    blob = SAMPLES[codec]
    for length in [*range(min(len(blob), 200)), *range(200, len(blob), 97)]:
        for call in (decode, describe):
            with pytest.raises(ArtifactError):
                call(blob[:length])
    with pytest.raises(ArtifactError):
        decode(blob + b"\0")


@pytest.mark.parametrize("codec", SAMPLES)
def test_resealed_damage_raises_nothing_else(codec: str) -> None:
    blob = SAMPLES[codec]
    generator = np.random.default_rng(2)
    head_bytes = struct.unpack_from("<I", blob, 4)[0]
    for _ in range(600):
        damaged = bytearray(blob)
        for place in generator.integers(0, head_bytes, generator.integers(1, 4)):
            damaged[place] = int(generator.integers(0, 256))
        try:
            decode(reseal(damaged), max_elements=1 << 22)
        except ArtifactError:
            continue


@pytest.mark.parametrize("codec", ["huffman", "ans"])
def test_hostile_chunks_raise_nothing_else(codec: str) -> None:
    generator = np.random.default_rng(3)
    for trial in range(300):
        tables = Writer()
        tables.unsigned(0)
        tables.signed(-3)
        tables.unsigned(5)
        tables.data += bytes(5) if codec == "ans" else b""
        tables.unsigned(0)
        chunk = generator.bytes(int(generator.integers(0, 40)))
        if trial % 3 == 0 and codec == "huffman":
            # A frame header that claims a content of 2 ** 62 bytes.
            chunk = bytes([0xE0]) + (1 << 62).to_bytes(8, "little") + chunk
        blob = assemble(codec, torch.int8, (1000,), np.dtype("i1"), tables.data, [chunk])
        try:
            decode(blob)
        except ArtifactError:
            continue


def test_random_bytes() -> None:
    generator = np.random.default_rng(4)
    for _ in range(500):
        with pytest.raises(ArtifactError):
            decode(b"\1" + generator.bytes(int(generator.integers(0, 60))))


def test_the_damaged_chunk_is_named() -> None:
    blob = bytearray(encode(torch.arange(CHUNK + 5) % 2 == 0))
    blob[-1] ^= 1
    with pytest.raises(ArtifactError, match="chunk 1 of 2"):
        decode(bytes(blob))


def test_claims_are_checked_before_memory_is_taken() -> None:
    tables = (0).to_bytes(9, "little")
    for shape in [(1 << 40,), (1 << 20, 1 << 20), (0, 1 << 61), (1 << 69, 1 << 69)]:
        with pytest.raises(ArtifactError, match="does not fit"):
            decode(assemble("bits", torch.int64, shape, np.dtype("u1"), tables, [b""]))
    legal = assemble("bits", torch.int64, (1 << 20,), np.dtype("u1"), tables, [b""])
    assert decode(legal).numel() == 1 << 20
    for call in (decode, describe):
        with pytest.raises(ArtifactError, match="more than the 1000 allowed"):
            call(legal, max_elements=1000)


def _split_zeros(height: int, width: int, lanes: int, taps: tuple[int, ...]) -> bytes:
    """A small blob that claims zeros whose streams are split by a context."""
    tables, values = Writer(), np.zeros(height * width, np.int8)
    for number in (SPLIT + 1, 1, 0):
        tables.unsigned(number)
    for length in (height, width):
        tables.block(encode(torch.zeros(length, dtype=torch.uint8)))
    for numbers in ((lanes,), taps, (1,), (values.size,)):
        inner = Writer()
        for number in numbers:
            inner.unsigned(number)
        tables.block(bytes(inner.data))
    window = RadixWindow(0, 2)
    tables.signed(window.low)
    tables.unsigned(window.span)
    tables.unsigned(0)
    pieces = [values[start : start + CHUNK] for start in range(0, values.size, CHUNK)]
    chunks = [huffman.compress(window.join(window.digitize(piece)[0])) for piece in pieces]
    return assemble("huffman", torch.int8, (height, width), np.dtype("i1"), tables.data, chunks)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", [(1, 1 << 20), (4, 1 << 18), (64, 1 << 14)], ids=str)
def test_split_streams_take_what_they_state(
    shape: tuple[int, int], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest delays claim 4160 rows of bits, and a row can have any of 64 classes."""
    if compiled:
        pytest.importorskip("numba")
    else:
        monkeypatch.delitem(sys.modules, "numba", raising=False)
    blob, allowance = _split_zeros(*shape, lanes=64, taps=(64,)), Allowance(1 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    decode(blob)
    if sys.platform == "linux":  # in KiB; compiling takes some, and tracemalloc does not see compiled loops
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 << 10
    tracemalloc.start()
    found = decode(blob, allowance=allowance)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not found.any() and peak <= allowance.stated
    with pytest.raises(ArtifactError, match="nothing was allocated"):
        decode(blob, allowance=Allowance(allowance.stated - 1))


def test_streams_of_narrow_matrices_cannot_be_split() -> None:
    """Row after row, NumPy would decode a million rows of one column for a minute."""
    with pytest.raises(ArtifactError, match="cannot be split"):
        decode(_split_zeros(100_000, 1, lanes=4, taps=(1,)))
    codes = torch.randint(-2, 3, (100_000, 3), dtype=torch.int8)
    assert encode(codes, QUANTIZERS) == encode(codes)


@pytest.mark.parametrize("lanes, taps", [(0, (1,)), (65, (1,)), (4, (0,)), (4, (65,)), (4, (1,) * 8)])
def test_contexts_that_no_encoder_writes(lanes: int, taps: tuple[int, ...]) -> None:
    with pytest.raises(ArtifactError, match="no context of parities"):
        decode(_split_zeros(200, 200, lanes, taps))


def test_nesting_is_limited() -> None:
    inner = encode(torch.zeros(3, dtype=torch.int64))
    for _ in range(5):
        tables = Writer()
        tables.unsigned(0)
        tables.signed(0)
        tables.unsigned(2)
        tables.unsigned(3)
        tables.block(inner)
        tables.block(inner)
        inner = assemble("huffman", torch.int64, (3,), np.dtype("<i8"), tables.data, [b""])
    with pytest.raises(ArtifactError, match="nested too deeply"):
        decode(inner)


def test_a_truth_value_is_zero_or_one() -> None:
    with pytest.raises(ArtifactError, match="a bool is neither"):
        decode(assemble("raw", torch.bool, (2,), np.dtype("u1"), b"", [b"\0\2"]))
