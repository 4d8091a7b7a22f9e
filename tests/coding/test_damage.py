"""No blob, damaged or malicious, does anything but raise ArtifactError."""

import struct
import zlib

import numpy as np
import pytest
import torch

from octavo.calibration.evidence import Evidence
from octavo.coding import decode, describe, encode
from octavo.coding.container import CHUNK, assemble
from octavo.coding.fields import Writer
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
