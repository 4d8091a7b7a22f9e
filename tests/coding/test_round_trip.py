"""Whatever is encoded comes back bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.coding import decode, describe, encode
from octavo.coding.container import CHUNK, DTYPES, MAX_DIMENSIONS
from octavo.errors import RequestError

INTEGERS = [dtype for dtype in DTYPES if dtype != torch.bool]


def check(tensor: torch.Tensor) -> str:
    """Round-trip a tensor; return the codec that was chosen."""
    blob = encode(tensor)
    decoded = decode(blob)
    assert decoded.dtype == tensor.dtype and decoded.shape == tensor.shape
    assert torch.equal(decoded, tensor)
    assert encode(tensor) == blob
    header = describe(np.frombuffer(blob, np.uint8))
    assert (header.dtype, header.shape, header.elements) == (tensor.dtype, tuple(tensor.shape), tensor.numel())
    return header.codec


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 40), max_size=3))
    generator = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    if dtype == torch.bool:
        return torch.from_numpy(np.array(generator.random(shape) < draw(st.floats(0, 1))))
    limits = torch.iinfo(dtype)
    values = np.rint(generator.laplace(draw(st.integers(-5, 99)), draw(st.sampled_from([0, 0.2, 2, 30, 1e5])), shape))
    array = np.array(np.clip(values, max(limits.min, -(1 << 53)), min(limits.max, 1 << 53))).astype(np.int64)
    flat = array.reshape(-1)
    if flat.size and draw(st.booleans()):
        where = generator.integers(0, flat.size, draw(st.integers(0, 5)))
        flat[where] = draw(st.sampled_from([limits.min, limits.max, limits.min + 1, limits.max // 3]))
    return torch.from_numpy(array).to(dtype)


@settings(max_examples=300, deadline=None)
@given(tensors())
def test_any_tensor(tensor: torch.Tensor) -> None:
    check(tensor)
    quick = decode(encode(tensor, independent=True))
    assert quick.dtype == tensor.dtype and torch.equal(quick, tensor)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (0, 5, 2), (1, 1, 1, 1), (7,), (20000,), (150, 150)])
def test_extremes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    limits = torch.iinfo(dtype)
    constant = torch.full(shape, limits.max, dtype=dtype)
    check(constant)
    check(torch.full(shape, limits.min, dtype=dtype))
    if constant.numel() > 1:
        constant.view(-1)[-1] = limits.min
        check(constant)


@pytest.mark.parametrize("scale", [0.1, 0.3, 1, 4, 30, 300])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int64])
def test_matrices_with_classes(scale: float, dtype: torch.dtype) -> None:
    generator = np.random.default_rng(1)
    rows, columns = np.exp(generator.standard_normal((200, 1))), np.exp(generator.standard_normal(150))
    values = np.rint(generator.laplace(size=(200, 150)) * rows * columns * scale)
    tensor = torch.from_numpy(values).clamp(-128, 127).to(dtype)
    check(tensor)
    check(tensor.reshape(200, 10, 15))
    check(tensor.T)
    if dtype != torch.int8:
        tensor[3, 5], tensor[199, 149] = -32768, 32767
        assert check(tensor) in ("huffman", "ans")


@pytest.mark.parametrize("scale", [0.1, 1.0, 40.0])
def test_several_chunks(scale: float) -> None:
    generator = np.random.default_rng(2)
    values = np.rint(generator.standard_normal(CHUNK + 12345, np.float32) * scale)
    values[[0, CHUNK - 1, CHUNK, -1]] = 100
    check(torch.from_numpy(values.astype(np.int8)))


def test_every_codec_is_chosen() -> None:
    generator = torch.Generator().manual_seed(3)
    assert check(torch.randint(-128, 128, (1000,), generator=generator, dtype=torch.int8)) == "raw"
    assert check(torch.randint(0, 8, (1000,), generator=generator)) == "bits"
    assert check((torch.randn(1000, generator=generator) * 2).round().int()) == "ans"
    # Probabilities that are powers of two, for which Huffman codes are exact.
    assert check(torch.rand(100000, generator=generator).log2().floor().int()) == "huffman"


def test_all_widths() -> None:
    generator = np.random.default_rng(4)
    for width in range(1, 65):
        bits = generator.integers(0, 1 << 63, 3000, dtype=np.uint64) << np.uint64(1)
        bits |= generator.integers(0, 2, 3000, dtype=np.uint64)
        check(torch.from_numpy((bits >> np.uint64(64 - width)).astype(np.int64)))


def test_floats_are_refused() -> None:
    with pytest.raises(RequestError, match="float32"):
        encode(torch.zeros(3))


def test_dimensions_are_limited_when_a_tensor_is_stored() -> None:
    check(torch.arange(8).view(8, *[1] * (MAX_DIMENSIONS - 1)))
    with pytest.raises(RequestError, match=r"up to 32 dimensions .* not of 33; flatten"):
        encode(torch.zeros([1] * 33, dtype=torch.int8))
