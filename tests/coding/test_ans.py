"""Streams of constriction's coder, read by constriction and by the compiled loop."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.coding import ans
from octavo.system import compiled


def slow(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    compiled.compiled.cache_clear()


@pytest.fixture(autouse=True)
def numba():
    yield pytest.importorskip("numba")
    compiled.compiled.cache_clear()


@st.composite
def streams(draw):
    generator = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    letters = draw(st.integers(2, 256))
    weights = np.exp(-np.abs(np.arange(letters) - generator.uniform(0, letters)) / draw(st.floats(0.05, 50)))
    table = ans.quantize(weights * generator.uniform(0.1, 1, letters))
    count = draw(st.sampled_from([1, 2, 3, 1000, 20_000]))
    bytes_ = generator.choice(len(ans._shares(table)), count, p=ans._shares(table))
    return table, bytes_.astype(np.uint8)


@settings(max_examples=80, deadline=None)
@given(streams())
def test_the_compiled_loop_reads_every_whole_stream(stream):
    table, bytes_ = stream
    words = np.frombuffer(ans.compress(bytes_, table), "<u4").astype(np.uint32)
    found = np.empty(len(bytes_), np.uint8)
    if len(words):
        assert compiled.compiled(ans._read)(words, *ans._tables(table), found)
        assert np.array_equal(found, bytes_)
    assert np.array_equal(ans.decompress(memoryview(words.tobytes()), len(bytes_), table), bytes_)


@pytest.mark.parametrize("letters", [2, 3, 16, 112, 255, 256])
def test_quantiles_start_where_constriction_lets_them(letters):
    generator = np.random.default_rng(letters)
    tables = [np.full(letters, 255, np.uint8), *(generator.integers(low, 256, letters) for low in (0, 128, 220))]
    for table in tables:
        table = table.astype(np.uint8)
        starts, _ = ans._tables(table)
        for byte in range(len(starts) - 1):
            # Coded onto nothing, a byte leaves the place where its quantiles start.
            (word, *_) = np.frombuffer(ans.compress(np.array([byte]), table), "<u4").tolist() or [0]
            assert word == starts[byte]


@pytest.mark.parametrize("harm", ["cut", "longer", "changed"])
def test_damaged_streams_give_what_constriction_gives(harm, monkeypatch):
    table = ans.quantize(np.exp(-np.abs(np.arange(40) - 20) / 3))
    bytes_ = np.random.default_rng(0).choice(40, 5000, p=ans._shares(table)).astype(np.uint8)
    words = np.frombuffer(ans.compress(bytes_, table), "<u4").copy()
    words = {
        "cut": words[5:],
        "longer": np.concatenate([words[:3], words]),
        "changed": words ^ (np.arange(len(words)) == 9),
    }[harm]
    quick = ans.decompress(memoryview(words.astype("<u4").tobytes()), len(bytes_), table)
    slow(monkeypatch)
    assert np.array_equal(quick, ans.decompress(memoryview(words.astype("<u4").tobytes()), len(bytes_), table))
