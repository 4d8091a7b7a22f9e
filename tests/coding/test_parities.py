"""Streams that are split by bits which the codes above determine."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.coding import ParityContext, decode, encode
from octavo.forms.trellis import QUANTIZERS

CONTEXTS = [QUANTIZERS, ParityContext(1, (1,), (1,)), ParityContext(3, (2, 5), (1, 4)), ParityContext(64, (), (1,))]
# Tensors of this size import numba, if it is there.
LARGE = 1 << 22


def bit(codes: np.ndarray, context: ParityContext, i: int, bits: np.ndarray) -> np.ndarray:
    """The bits of a row, by the definition."""
    found = np.zeros(codes.shape[1], np.uint8)
    for taps, source in ((context.own, bits), (context.parities, codes)):
        for tap in taps:
            if i >= context.lanes * tap:
                found ^= (source[i - context.lanes * tap] & 1).astype(np.uint8)
    return found


def drawn(shape: tuple[int, int], context: ParityContext, seed: int = 0, wide: float = 1.0) -> np.ndarray:
    """Codes around 0 where the bit is 0, and around -1/2 where it is 1; rows and columns have sizes of their own."""
    generator = np.random.default_rng(seed)
    sizes = (
        np.exp(generator.standard_normal((shape[0], 1)) / 2) * np.exp(generator.standard_normal(shape[1]) / 2) * wide
    )
    noise = generator.laplace(size=shape) * sizes / 2
    codes, bits = np.zeros(shape, np.int16), np.zeros(shape, np.uint8)
    for i in range(shape[0]):
        bits[i] = bit(codes, context, i, bits)
        codes[i] = np.rint(noise[i]) if not i else np.where(bits[i], np.floor(noise[i]), np.rint(noise[i]))
    return codes


@pytest.mark.parametrize("context", CONTEXTS, ids=str)
def test_all_bits_at_once_are_those_of_the_definition(context: ParityContext) -> None:
    codes = np.random.default_rng(0).integers(-9, 9, (90, 5)).astype(np.int8)
    bits = np.zeros(codes.shape, np.uint8)
    for i in range(len(codes)):
        bits[i] = bit(codes, context, i, bits)
    assert np.array_equal(context.bits(codes), bits)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 300), st.integers(1, 300)), st.sampled_from(CONTEXTS), st.integers(0, 99),
    st.sampled_from([torch.int8, torch.int16, torch.int32, torch.uint8]),
)  # fmt: skip
def test_any_matrix_comes_back(shape: tuple[int, int], context: ParityContext, seed: int, dtype: torch.dtype) -> None:
    codes = torch.from_numpy(drawn(shape, context, seed)).to(dtype)
    blob = encode(codes, context)
    assert torch.equal(decode(blob), codes) and encode(codes, context) == blob
    assert len(blob) <= 1.002 * len(encode(codes)) + 8


@pytest.mark.parametrize("context", CONTEXTS[:3], ids=str)
def test_bytes_are_saved_where_codes_depend_on_bits(context: ParityContext) -> None:
    codes = torch.from_numpy(drawn((400, 300), context, wide=0.5))
    assert len(encode(codes, context)) < 0.93 * len(encode(codes))


def test_nothing_changes_where_they_do_not() -> None:
    codes = torch.from_numpy(np.rint(np.random.default_rng(0).laplace(size=(300, 200)) * 9).astype(np.int16))
    assert encode(codes, QUANTIZERS) == encode(codes)


def test_escapes_are_put_where_they_were() -> None:
    codes = drawn((300, 200), QUANTIZERS, wide=0.5)
    codes[[3, 77, 299], [0, 100, 199]] = [30_001, -30_000, 9_999]
    assert torch.equal(decode(encode(torch.from_numpy(codes), QUANTIZERS)), torch.from_numpy(codes))


def test_the_compiled_loop_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    codes = torch.from_numpy(np.tile(drawn((256, 64), QUANTIZERS, wide=0.5), (1, LARGE // 256 // 64)))
    blob = encode(codes, QUANTIZERS)
    assert torch.equal(decode(blob), codes)
    small = torch.from_numpy(drawn((256, 128), QUANTIZERS, wide=0.5))
    quick = decode(encode(small, QUANTIZERS))
    monkeypatch.delitem(sys.modules, "numba", raising=False)
    assert torch.equal(decode(encode(small, QUANTIZERS)), quick)
