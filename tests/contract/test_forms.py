"""The contract of every form: stored parts give back the same matrix, and nothing else passes."""

import ctypes
import gc
import math
import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.artifact import pack, unpack
from octavo.coding.ggml import TYPES
from octavo.errors import ArtifactError
from octavo.forms import (
    E8,
    Affine,
    BlockScaled,
    Codebook,
    Dense,
    DenseSparse,
    Exact,
    Folded,
    Frequency,
    Grid,
    GroupedLowRank,
    Hash,
    Hashed,
    LowRank,
    RowBlocks,
    Scaled,
    Separable,
    Sparse,
    Sum,
    TensorTrain,
    Trellis,
    Trimmed,
    Vectors,
    form_names,
    restore,
)
from octavo.forms.base import MAX_DEPTH, allowance_for
from octavo.forms.floats import split
from octavo.forms.ggml import GgmlBlocks
from octavo.forms.tensor_train import full_ranks


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def dense(rows, columns, seed, dtype=torch.float32):
    return Dense(torch.randn(rows, columns, generator=_generator(seed)).to(dtype))


def exact(rows, columns, seed, dtype=torch.float32):
    return Exact(dense(rows, columns, seed, dtype).weight)


def grid(rows, columns, seed, kind="tensor"):
    g = _generator(seed)
    codes = torch.randint(-9, 10, (rows, columns), generator=g, dtype=torch.int8)
    groups = {"group": min(3, columns), "zero": min(2, columns)}.get(kind, 1)
    scale = torch.rand(1 if kind in ("tensor", "steps") else rows, groups, generator=g) + 0.1
    # Groups are as wide as they can be: all of them must have a column.
    scale = scale[:, : math.ceil(columns / math.ceil(columns / groups))].contiguous()
    zero = torch.randint(0, 5, scale.shape, generator=g, dtype=torch.uint8) if kind == "zero" else None
    if kind != "steps":
        return Grid(codes, scale.half() if kind == "group" else scale, zero)
    exponents = [torch.randint(-60, 60, (n,), generator=g, dtype=torch.int16) for n in (rows, columns)]
    return Grid(codes, scale, None, *exponents)


def affine(rows, columns, seed, kind="plain"):
    """Steps as they come, fitted to bfloat16 extremes, or products of a shared factor with small integers."""
    g = _generator(seed)
    groups = next(n for n in (8, 3, 2, 1) if columns % n == 0)
    codes = torch.randint(0, 16, (rows, columns), generator=g, dtype=torch.int16)
    step, low = (torch.rand(rows, groups, generator=g).bfloat16().float() + k for k in (0.5, -1.0))
    if kind == "reach":
        step = ((step - low) / 15).half().float()
    if kind == "product":
        step = (step[:, :1].half() * torch.randint(0, 64, step.shape, generator=g)).float()
    if kind == "negative":
        return Affine(codes - 8, torch.where(step < 1, -step, step))
    return Affine(codes, step, low, torch.bfloat16 if kind == "rounded" else torch.float32)


def e8(rows, columns, seed):
    blocks, generator = -(-columns // 8), torch.Generator().manual_seed(seed)
    first, last = (torch.randint(-3, 4, (rows, n), generator=generator, dtype=torch.int8) for n in (7 * blocks, blocks))
    return E8(first, last, torch.rand(rows, blocks, generator=generator) < 0.5, columns)


def codebook(rows, columns, seed, scaled=False, values=7):
    g = _generator(seed)
    codes = torch.randint(0, values, (rows, columns), generator=g, dtype=torch.int32 if values > 256 else torch.uint8)
    return Codebook(
        codes, torch.randn(values, generator=g).half(), torch.rand(rows, 1, generator=g) if scaled else None
    )


def sparse(rows, columns, seed, share=0.3, values=grid):
    mask = torch.rand(rows, columns, generator=_generator(seed)) < share
    empty = Grid(torch.zeros(1, 0, dtype=torch.int8), torch.ones(1, 1))
    return Sparse(mask, values(1, int(mask.sum()), seed + 1) if mask.any() else empty)


def n_of_m(rows, columns, seed, keep=2, group=4):
    columns = group * math.ceil(columns / group)
    scores = torch.rand(rows, columns // group, group, generator=_generator(seed))
    mask = (scores.argsort(-1).argsort(-1) < keep).reshape(rows, columns)
    return Sparse(mask, grid(1, int(mask.sum()), seed + 1), (keep, group))


def vectors(rows, columns, seed, books=1, width=4, shared=False, groups=0):
    """Blocks of four columns; the last may be narrower."""
    g = _generator(seed)
    blocks = -(-columns // width)
    codes = torch.randint(0, 6, (books, rows, blocks), generator=g, dtype=torch.uint8)
    values = torch.randn(books, 1 if shared else blocks, 6, width, generator=g).half()
    # Groups are as wide as they can be: all of them must have a column.
    groups = math.ceil(columns / math.ceil(columns / min(groups, columns))) if groups else 0
    return Vectors(codes, values, columns, torch.rand(rows, groups, generator=g) + 0.1 if groups else None)


def hashed(rows, columns, seed, kind="sum", inner=grid):
    """Rows of a smaller table: by remainder and quotient, two hash functions, or signs and pieces."""
    if kind == "product":
        size = math.ceil(rows**0.5)
        count = math.ceil(rows / size)
        hashes = (Hash(size), Hash(count, size, divisor=size))
        return Hashed(inner(size + count, columns, seed), hashes, rows, columns, product=True)
    width = min(3, columns) if kind == "pieces" else columns
    size = max(1, rows * -(-columns // width) // 3)
    hashes = tuple(Hash(size, 0, 1, 48271 + k, 11 + seed % 97, int(kind == "pieces")) for k in range(2))
    return Hashed(inner(size, width, seed), hashes, rows, columns)


def gains(rows, seed):
    return torch.randint(-128, 129, (rows,), generator=_generator(seed), dtype=torch.int16)


def lowrank(rows, columns, seed, inner=grid):
    rank = max(1, min(rows, columns) // 2)
    return LowRank(inner(rows, rank, seed), inner(rank, columns, seed + 1))


def grouped(rows, columns, seed, inner=grid):
    groups = next(n for n in (4, 3, 2, 1) if columns % n == 0)
    rank = max(1, min(rows, columns // groups) // 2)
    return GroupedLowRank(inner(rows, groups * rank, seed), inner(groups * rank, columns // groups, seed + 1), groups)


def kernel_of(columns):
    """Channels, height and width with as many elements."""
    return next((columns // n, n // 2, 2) if n == 4 else (columns // n, 1, n) for n in (4, 3, 2, 1) if columns % n == 0)


def folded(rows, columns, seed, fold, inner=grid):
    c, h, w = kernel_of(columns)
    shape = (c * h, rows * w) if fold == "spatial" else (h * w, rows * c)
    return Folded(inner(*shape, seed), fold, (c, h, w))


def frequency(rows, columns, seed, kind="kernels"):
    """Grids of kernels, and tiles of centres with a sparse correction."""
    _, h, w = kernel_of(columns)
    if kind == "kernels":
        return Frequency(grid(rows, columns, seed, "steps"), (1, h, w))
    tile = next(n for n in (4, 3, 2, 1) if rows % n == 0)
    return Frequency(Sum(vectors(rows, columns, seed, shared=True), sparse(rows, columns, seed + 1)), (tile, 1, h * w))


def rowblocks(rows, columns, seed):
    count = min(3, rows)
    member = torch.arange(rows)[torch.randperm(rows, generator=_generator(seed))] % count
    sizes = member.bincount(minlength=count).tolist()
    blocks = [lowrank(size, columns, seed + number) for number, size in enumerate(sizes)]
    return RowBlocks(member.to(torch.uint8), tuple(blocks))


def dense_sparse(rows, columns, seed, width=4, inner=grid):
    width = min(width, columns)
    atoms, blocks = max(width, min(rows, 6)), -(-columns // width)
    nonzeros = min(2, atoms)
    index = torch.rand(rows, blocks, atoms, generator=_generator(seed)).argsort(-1)[..., :nonzeros].sort(-1).values
    return DenseSparse(
        inner(rows, blocks * nonzeros, seed), index.flatten(1).to(torch.uint8), inner(blocks * atoms, width, seed + 1),
        nonzeros, columns,
    )  # fmt: skip


def tensor_train(rows, columns, seed, cores=2, inner=dense):
    """Modes of two, three and what is left; a last core that is cut."""
    first, second = (2, 3) if min(rows, columns) > 5 else (1, 1)
    o, i = [first, -(-rows // first)], [second, -(-columns // second)]
    if cores == 3:
        o, i = [first, 1, o[1]], [1, second, i[1]]
    ranks = [min(3, most) for most in full_ranks(o, i)]
    return TensorTrain(
        tuple(inner(ranks[k] * o[k] * i[k], ranks[k + 1], seed + k) for k in range(len(o))),
        tuple(o), tuple(i), rows, columns,
    )  # fmt: skip


def separable(rows, columns, seed):
    c, h, w = kernel_of(columns)
    terms = min(2, c * h, c * w, h * w)
    parts = (grid(terms * rows, size, seed + k) for k, size in enumerate((c, h, w)))
    return Separable(*parts, terms)


def cut(rows, columns, seed):
    kept = [torch.rand(n, generator=_generator(seed + n)) < 0.7 for n in (rows, columns)]
    for mask in kept:
        mask[0] = True
    return Trimmed(grid(*(int(mask.sum()) for mask in kept), seed), *kept)


def ggml(rows, columns, seed, name):
    kind, generator = TYPES[name], _generator(seed)
    blocks = -(-columns // kind.block)
    found = kind.unpacked(torch.randint(0, 256, (rows, blocks * kind.bytes), generator=generator, dtype=torch.uint8))
    heads = {"d": torch.randn(rows, blocks, generator=generator).half()}
    if kind.offset:
        heads["base"] = torch.randn(rows, blocks, generator=generator).half()
    return GgmlBlocks(kind.packed(replace(found, **heads)), name, columns)


FORMS = {
    "ggml of small blocks": lambda r, c, s: ggml(r, c, s, "q5_1"),
    "ggml of two levels": lambda r, c, s: ggml(r, c, s, "q3_k"),
    "dense": dense,
    "dense float16": lambda r, c, s: dense(r, c, s, torch.float16),
    "dense bfloat16": lambda r, c, s: dense(r, c, s, torch.bfloat16),
    "exact": exact,
    "exact float16": lambda r, c, s: exact(r, c, s, torch.float16),
    "exact bfloat16": lambda r, c, s: exact(r, c, s, torch.bfloat16),
    "grid": grid,
    "grid per channel": lambda r, c, s: grid(r, c, s, "channel"),
    "grid per group": lambda r, c, s: grid(r, c, s, "group"),
    "grid with zeros": lambda r, c, s: grid(r, c, s, "zero"),
    "grid with steps": lambda r, c, s: grid(r, c, s, "steps"),
    "affine": affine,
    "affine fitted": lambda r, c, s: affine(r, c, s, "reach"),
    "affine of two levels": lambda r, c, s: affine(r, c, s, "product"),
    "affine of either sign": lambda r, c, s: affine(r, c, s, "negative"),
    "affine rounded": lambda r, c, s: affine(r, c, s, "rounded"),
    "codebook": codebook,
    "codebook with scale": lambda r, c, s: codebook(r, c, s, scaled=True),
    "codebook of many": lambda r, c, s: codebook(r, c, s, values=700),
    "e8": e8,
    "block scaled": lambda r, c, s: BlockScaled(codebook(r, c, s), codebook(r, -(-c // max(1, c // 3)), s + 1)),
    "block scaled(dense)": lambda r, c, s: BlockScaled(codebook(r, c, s), dense(r, min(c, 2), s + 1)),
    "lowrank(grid, grid)": lowrank,
    "lowrank(dense, dense)": lambda r, c, s: lowrank(r, c, s, dense),
    "sparse(grid) dense mask": lambda r, c, s: sparse(r, c, s, 0.6),
    "sparse(grid) few": lambda r, c, s: sparse(r, c, s, 0.03),
    "sparse nothing": lambda r, c, s: sparse(r, c, s, 0.0),
    "sparse(dense)": lambda r, c, s: sparse(r, c, s, 0.1, dense),
    "sparse(exact)": lambda r, c, s: sparse(r, c, s, 0.4, exact),
    "sparse nothing of dense": lambda r, c, s: Sparse(torch.zeros(r, c, dtype=torch.bool), dense(1, 0, s)),
    "sparse everything": lambda r, c, s: sparse(r, c, s, 1.1),
    "sparse(codebook)": lambda r, c, s: sparse(r, c, s, values=codebook),
    "sparse 2:4": n_of_m,
    "sparse 4:8": lambda r, c, s: n_of_m(r, c, s, 4, 8),
    "sparse 1:2": lambda r, c, s: n_of_m(r, c, s, 1, 2),
    "sum(grid, lowrank)": lambda r, c, s: Sum(grid(r, c, s), lowrank(r, c, s + 7)),
    "scaled(grid)": lambda r, c, s: Scaled(grid(r, c, s, "steps"), gains(r, s)),
    "sum(grid, sparse)": lambda r, c, s: Sum(grid(r, c, s, "steps"), sparse(r, c, s + 7)),
    "trellis": lambda r, c, s: Trellis(grid(r, c, s, "steps")),
    "sum(trellis, lowrank)": lambda r, c, s: Sum(Trellis(grid(r, c, s)), lowrank(r, c, s + 7)),
    "grouped lowrank": grouped,
    "grouped lowrank(dense, dense)": lambda r, c, s: grouped(r, c, s, dense),
    "folded spatial": lambda r, c, s: folded(r, c, s, "spatial", lowrank),
    "folded filter": lambda r, c, s: folded(r, c, s, "filter"),
    "frequency of kernels": frequency,
    "frequency of tiles": lambda r, c, s: frequency(r, c, s, "tiles"),
    "row blocks": rowblocks,
    "dense sparse": dense_sparse,
    "dense sparse of wide blocks": lambda r, c, s: dense_sparse(r, c, s, 9, dense),
    "tensor train": tensor_train,
    "tensor train of three": lambda r, c, s: tensor_train(r, c, s, 3, grid),
    "separable": separable,
    "cut": cut,
    "hashed": hashed,
    "hashed remainder and quotient": lambda r, c, s: hashed(r, c, s, "product", dense),
    "hashed pieces": lambda r, c, s: hashed(r, c, s, "pieces"),
    "vectors": vectors,
    "vectors of two shared books": lambda r, c, s: vectors(r, c, s, 2, shared=True, groups=1),
    "vectors in scaled groups": lambda r, c, s: vectors(r, c, s, 3, width=5, groups=4),
    "lowrank(sum, sparse)": lambda r, c, s: LowRank(
        Sum(grid(r, min(2, max(r, c)), s), codebook(r, min(2, max(r, c)), s + 1)),
        sparse(min(2, max(r, c)), c, s + 2, 0.5)
    ),
}  # fmt: skip

#: Parts whose absence makes another valid form of the same class.
OPTIONAL = {"zero", "rows", "columns", "scale", "negative"}


def everything(meta):
    if "form" in meta:
        yield meta["form"]
    for value in meta.values():
        if isinstance(value, dict):
            yield from everything(value)


def cases(rows=9, columns=16, seed=3):
    return {name: make(rows, columns, seed) for name, make in FORMS.items()}


def test_every_registered_form_is_in_the_table():
    covered = {kind for form in cases().values() for kind in everything(form.meta())}
    assert covered == set(form_names())


def parts_of(form):
    return {name: part.clone() for name, part in form.tensors().items()}


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=12, deadline=None)
@given(rows=st.integers(1, 19), columns=st.integers(1, 33), seed=st.integers(0, 2**20))
def test_restored_forms_are_bit_equal(name, rows, columns, seed):
    form = FORMS[name](rows, columns, seed)
    matrix = form.dense()
    assert matrix.dtype == torch.float32 and tuple(matrix.shape) == form.shape
    again = restore(form.tensors(), form.meta(), form.shape)
    assert type(again) is type(form) and again.shape == form.shape
    assert torch.equal(again.dense(), matrix)
    assert torch.equal(form.dense(), matrix), "asking for the matrix changed the form"
    packed = pack(form)
    assert sum(packed.codecs.values()) == packed.bytes == len(packed.blob)
    read = unpack(memoryview(packed.blob), packed.parts, packed.meta, form.shape)
    assert torch.equal(read.dense(), matrix)
    assert pack(read).blob == packed.blob


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=10, deadline=None)
@given(
    rows=st.integers(1, 19), columns=st.integers(1, 33), seed=st.integers(0, 2**20),
    lead=st.sampled_from([(), (1,), (5,), (2, 3)]),
)  # fmt: skip
def test_apply_is_the_product_with_the_matrix(name, rows, columns, seed, lead):
    form = FORMS[name](rows, columns, seed)
    x = torch.randn(*lead, form.shape[1], generator=_generator(seed))
    expected = x.double() @ form.dense().double().T
    got = form.apply(x)
    assert got.dtype == x.dtype and got.shape == (*lead, form.shape[0])
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4 * (1 + float(expected.abs().max())))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("rows", [9, 300])
def test_lookup_gives_rows_of_the_matrix(name, rows):
    form = FORMS[name](rows, 16, 3)
    dense = form.dense()
    for index in ([], [rows - 1], [2, 0, 2, 2], list(range(rows)) * 2):
        torch.testing.assert_close(form.lookup(torch.tensor(index, dtype=torch.long)), dense[index])


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            # A view may have many more elements than there are in memory.
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return out


def train_of(row_modes, column_modes, chi):
    ranks = [min(chi, most) for most in full_ranks(row_modes, column_modes)]
    sizes = [o * i for o, i in zip(row_modes, column_modes, strict=True)]
    cores = tuple(dense(ranks[k] * size, ranks[k + 1], k) for k, size in enumerate(sizes))
    return TensorTrain(cores, row_modes, column_modes, math.prod(row_modes), math.prod(column_modes))


#: Forms, what is done with them, and the elements that may be held at once.
BOUNDED = {
    "groups": (lambda: grouped(64, 256, 0), lambda form: form.apply(torch.ones(2048, 256)), 2048 * 256),
    "a wide train": (
        lambda: train_of((16, 24), (32, 48), 177), lambda form: form.apply(torch.ones(512, 1536)), 512 * 1536,
    ),
    "a train of many inputs": (
        lambda: train_of((16, 16), (16, 16), 8), lambda form: form.apply(torch.ones(8192, 256)), 1 << 22,
    ),
    "a train whose chain is far larger than its matrix": (
        lambda: train_of((256, 1), (1, 256), 256), lambda form: form.apply(torch.ones(1, 256)), 4 * 256 * 256,
    ),
    "rows of a train": (
        lambda: train_of((64, 64), (16, 24), 64), lambda form: form.lookup(torch.arange(4096)), 4096 * 384,
    ),
    "one row of a train many times": (
        lambda: train_of((64, 64), (16, 24), 64), lambda form: form.lookup(torch.zeros(4096).long()), 4096 * 384,
    ),
    "as many atoms as rows": (
        lambda: dense_sparse_of(1024, 16, 1, 1024), lambda form: form.dense(), 2 * 1024 * 16,
    ),
    "many terms": (
        lambda: Separable(*(dense(4096 * 2, 64, k) for k in range(3)), 4096), lambda form: form.dense(), 1 << 24,
    ),
}  # fmt: skip


def dense_sparse_of(rows, columns, width, atoms):
    blocks = columns // width
    index = torch.randint(0, atoms, (rows, blocks), generator=_generator(0))
    return DenseSparse(dense(rows, blocks, 0), index, dense(blocks * atoms, width, 1), 1, columns)


@pytest.mark.parametrize("name", BOUNDED)
def test_little_more_is_held_than_the_matrix_and_the_result(name):
    make, act, most = BOUNDED[name]
    form = make()
    with Largest() as largest:
        act(form)
    assert largest.elements <= most


def test_rows_put_together_atom_by_atom_are_right():
    form = dense_sparse_of(64, 6, 2, 64)
    expected = torch.cat([form.dictionary.weight[:64][form.index[:, 0]] * form.values.weight[:, :1]], 1)
    torch.testing.assert_close(form.dense()[:, :2], expected)


def test_what_is_said_to_be_held_is_held():
    for name, form in cases().items():
        known = {part.data_ptr() for part in form.held()}
        assert known == {part.data_ptr() for part in form.held()}, name


def test_what_forms_stand_for():
    codes = torch.tensor([[1, -2, 3], [0, 5, -6]], dtype=torch.int8)
    scale, zero = torch.tensor([[0.5, 2.0], [1.0, 4.0]]), torch.tensor([[1, 0], [2, 1]], dtype=torch.uint8)
    grouped = Grid(codes, scale, zero).dense()
    assert torch.equal(grouped, torch.tensor([[0.0, -1.5, 6.0], [-2.0, 3.0, -28.0]]))
    steps = Grid(codes, torch.ones(1, 1), None, torch.tensor([8, 0]), torch.tensor([0, -8, 16])).dense()
    assert torch.equal(steps, torch.tensor([[2.0, -2.0, 24.0], [0.0, 2.5, -24.0]]))
    book = Codebook(torch.tensor([[0, 1], [2, 0]]), torch.tensor([1.0, -2, 3]), torch.tensor([[1.0], [10]])).dense()
    assert torch.equal(book, torch.tensor([[1.0, -2], [30, 10]]))
    codes = torch.tensor([[[0, 1], [1, 1]], [[1, 0], [0, 0]]], dtype=torch.uint8)
    values = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]], [[[0.0, 0.0], [10.0, 20.0]]]])
    vectors = Vectors(codes, values, 3, torch.tensor([[1.0], [2.0]])).dense()
    assert torch.equal(vectors, torch.tensor([[11.0, 22.0, 3.0], [6.0, 8.0, 6.0]]))
    mask = torch.tensor([[True, False], [False, True]])
    assert torch.equal(Sparse(mask, Dense(torch.tensor([[4.0, 5.0]]))).dense(), torch.tensor([[4.0, 0], [0, 5]]))
    two = Dense(torch.eye(2))
    assert torch.equal(Sum(two, two).dense(), 2 * torch.eye(2))
    product = LowRank(Dense(torch.tensor([[1.0], [2]])), Dense(torch.tensor([[3.0, 4]]))).dense()
    assert torch.equal(product, torch.tensor([[3.0, 4], [6, 8]]))


def test_a_mask_is_stored_in_the_smallest_way():
    def mask_bytes(form):
        packed = pack(form)
        return {name: entry[1] for name, entry in packed.parts.items() if "/" not in name}

    few, many = mask_bytes(sparse(64, 64, 0, 0.01)), mask_bytes(sparse(64, 64, 0, 0.5))
    assert set(few) <= {"gaps", "mask"} and sum(few.values()) < 64 * 64 / 8 / 3
    assert sum(many.values()) < 64 * 64 / 8 + 64
    patterns = mask_bytes(n_of_m(64, 64, 0))
    # log2(6) bits for every four weights.
    assert set(patterns) == {"patterns"} and patterns["patterns"] < 64 * 64 / 4 * 2.6 / 8 + 128


@pytest.mark.parametrize("share", [0.02, 0.256, 0.7])
@pytest.mark.parametrize("way", ["mask", "gaps"])
def test_a_mask_is_restored_in_the_way_it_was_stored(way, share):
    """Even if the other would be smaller: another version of the coder may think so, and digests must not change."""
    form = replace(sparse(64, 96, 0, share), stored_as=way)
    packed = pack(form)
    again = unpack(memoryview(packed.blob), packed.parts, packed.meta, form.shape)
    assert way in packed.parts and set(again.tensors()) == set(packed.parts)
    assert pack(again).blob == packed.blob and torch.equal(again.dense(), form.dense())


@pytest.mark.parametrize(
    "name", ["dense", "exact", "grid", "sparse(grid) few", "folded filter", "affine", "row blocks"]
)
def test_scaling_leaves_what_is_scaled(name):
    base = cases()[name]
    expected = base.dense().clone()
    form = Scaled(base, gains(len(expected), 3))
    for _ in range(2):
        torch.testing.assert_close(form.dense(), form.factors[:, None] * expected, rtol=1e-6, atol=0)
    assert torch.equal(base.dense(), expected)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 28), (torch.float16, 15), (torch.bfloat16, 12)])
def test_floats_without_loss_take_fewer_bits(dtype, most):
    weight = 0.05 * torch.randn(64, 512, generator=_generator(0)).to(dtype)
    form = Exact(weight)
    packed = pack(form)
    assert 8 * packed.bytes / weight.numel() < most
    again = unpack(memoryview(packed.blob), packed.parts, packed.meta, form.shape)
    assert torch.equal(again.weight, weight) and again.weight.dtype == dtype
    # The narrowest type that holds all values.
    assert Exact.of(weight.float()).weight.dtype == dtype


def test_floats_without_loss_keep_every_bit():
    odd = torch.tensor([[0.0, -0.0, 1e-45, -1e-38, 3e38, -1.5, 65504.0]])
    for weight in (odd, odd.bfloat16(), odd.clamp(-6e4, 6e4).half()):
        form = Exact(weight)
        again = restore(form.tensors(), form.meta(), form.shape)
        assert torch.equal(again.weight.signbit(), weight.signbit()) and torch.equal(again.weight, weight)
    infinite = Exact(torch.ones(1, 3)).tensors()
    infinite["high"][0, 1] = 255
    refused(infinite, Exact(torch.ones(1, 3)).meta(), (1, 3))


def refused(parts, meta, shape):
    with pytest.raises(ArtifactError):
        restore(parts, meta, shape)


@pytest.mark.parametrize("name", FORMS)
def test_malformed_parts_are_refused(name):
    form = cases()[name]
    meta, shape = form.meta(), form.shape
    assert restore(parts_of(form), meta, shape).shape == shape
    for part, tensor in parts_of(form).items():
        if part.rpartition("/")[2] not in OPTIONAL:
            refused({key: value for key, value in parts_of(form).items() if key != part}, meta, shape)
        refused({**parts_of(form), part: tensor[None]}, meta, shape)
        if tensor.is_floating_point():
            refused({**parts_of(form), part: tensor.to(torch.int32)}, meta, shape)
            for value in (math.nan, math.inf) if tensor.numel() else ():
                bad = tensor.clone()
                bad.view(-1)[-1] = value
                refused({**parts_of(form), part: bad}, meta, shape)
        else:
            refused({**parts_of(form), part: tensor.float()}, meta, shape)
            refused({**parts_of(form), part: torch.cat([tensor, tensor[:1]])} if len(tensor) else {}, meta, shape)


@pytest.mark.parametrize("name", FORMS)
def test_another_matrix_shape_is_refused(name):
    form = cases()[name]
    rows, columns = form.shape
    if not form.dense().any():
        pytest.skip("nothing but zeros fits every shape")
    for shape in ((rows + 1, columns), (rows, columns + 1), (columns, rows), (rows * columns, 1)):
        refused(parts_of(form), form.meta(), shape)


def test_indices_out_of_range_are_refused():
    for value in (7, 200):
        form = codebook(5, 6, 0)
        form.codes[2, 3] = value
        refused(form.tensors(), form.meta(), form.shape)
    form = codebook(5, 6, 0, values=700)
    form.codes[2, 3] = -1
    refused(form.tensors(), form.meta(), form.shape)
    pattern = n_of_m(4, 8, 0)
    parts = parts_of(pattern)
    parts["patterns"][3] = 6
    refused(parts, pattern.meta(), pattern.shape)
    steps = grid(4, 8, 0, "steps")
    parts = parts_of(steps)
    parts["rows"][1] = 3000
    refused(parts, steps.meta(), steps.shape)
    few = sparse(40, 40, 0, 0.02)
    parts = parts_of(few)
    assert "gaps" in parts
    for value in (-2, 1600, 2**62):
        refused({**parts, "gaps": parts["gaps"].clone().index_fill_(0, torch.tensor(1), value)}, few.meta(), few.shape)


@pytest.mark.parametrize(
    ("step", "how", "more"),
    [
        (torch.tensor([[1e30]]).bfloat16().float(), {"kind": "reach", "levels": 3}, {}),
        (
            torch.tensor([[3e38]]),
            {"kind": "product", "block": 1},
            {"step/ratio": torch.tensor([[100]], dtype=torch.int16)},
        ),
    ],
)
def test_steps_that_overflow_are_refused(step, how, more):
    """All numbers in the file are finite, but not what is computed from them."""
    form = Affine(torch.tensor([[1, 2, 3, -3]], dtype=torch.int16), torch.tensor([[0.5]]))
    floats, meta = split(step)
    parts = {key: part for key, part in form.tensors().items() if not key.startswith("step/")}
    parts |= {f"step/{key}": part for key, part in floats.items()} | more
    with pytest.raises(ArtifactError, match="not finite"):
        restore(parts, {**form.meta(), "step": {**how, **meta}}, form.shape)


def test_vectors_that_are_not_there_are_refused():
    form = cases()["vectors"]
    for number in (6, 200):
        codes = form.codes.clone()
        codes[0, 4, 1] = number
        refused({**parts_of(form), "codes": codes}, form.meta(), form.shape)
    refused({**parts_of(form), "values": form.values[:, :2]}, form.meta(), form.shape)
    refused({**parts_of(form), "values": form.values[:, :, :0]}, form.meta(), form.shape)


def test_rows_of_vectors_grow_and_vectors_do_not():
    form = vectors(4000, 16, 0)
    more = form.grown(2, lambda form: pack(form).bytes)
    assert more == pytest.approx(pack(vectors(8000, 16, 0)).bytes, rel=0.05)


def test_rows_that_a_table_does_not_have_are_refused():
    form = cases()["hashed"]
    # Size, start, divisor and factor.
    for place, value in ((0, 0), (0, 99), (1, 1), (2, 0), (3, 2**31)):
        hashes = [list(numbers) for numbers in form.meta()["hashes"]]
        hashes[1][place] = value
        with pytest.raises(ArtifactError, match="hash function"):
            restore(parts_of(form), {**form.meta(), "hashes": hashes}, form.shape)
    refused(parts_of(form), {**form.meta(), "hashes": []}, form.shape)
    refused(parts_of(form), {**form.meta(), "hashes": form.meta()["hashes"] * 9}, form.shape)
    for index in (-1, 9):
        with pytest.raises(IndexError, match="out of range for 9 rows"):
            form.lookup(torch.tensor([0, index]))


def test_hashes_give_the_rows_that_they_say():
    table = torch.randn(5, 4, generator=_generator(0))
    quotients = Hashed(Dense(table), (Hash(3), Hash(2, 3, divisor=3)), 6, 4, product=True).dense()
    assert torch.equal(quotients[4], table[1] * table[3 + 1])
    signs = Hashed(Dense(table), (Hash(5, signed=1),), 12, 4).dense()
    assert torch.equal(signs[2], table[2]) and torch.equal(signs[7], -table[2]) and torch.equal(signs[11], table[1])
    pieces = Hashed(Dense(table[:, :2]), (Hash(5, 0, 1, 3, 1),), 4, 3).dense()
    # Row 1 is pieces 2 and 3, of which the second is cut: places 7 and 10 modulo 5.
    assert torch.equal(pieces[1], torch.stack([table[2, 0], table[2, 1], table[0, 0]]))


def test_gaps_lead_to_atoms_that_their_own_dtype_cannot_count():
    form = dense_sparse_of(300, 4, 4, 300)
    form = DenseSparse(dense(300, 2, 0), torch.tensor([[200, 290]] * 300), form.dictionary, 2, 4)
    parts = parts_of(form)
    again = restore({**parts, "gaps": parts["gaps"].to(torch.uint8)}, form.meta(), form.shape)
    assert torch.equal(again.dense(), form.dense())
    refused({**parts, "index": form.index}, form.meta(), form.shape)


def test_blocks_that_are_not_there_are_refused_before_they_are_counted():
    form = cases()["row blocks"]
    for number in (3, -1, 1 << 28):
        member = form.member.long()
        member[4] = number
        with pytest.raises(ArtifactError, match="none of the 3 blocks"), Largest() as largest:
            restore({**parts_of(form), "member": member}, form.meta(), form.shape)
        assert largest.elements < 1000


@pytest.mark.parametrize("name", FORMS)
def test_descriptions_that_octavo_does_not_write_are_refused(name):
    form = cases()[name]
    meta, nested = form.meta(), {}
    for _ in range(600):
        nested = {"inner": nested}
    for value in (7, "x", nested):
        refused(parts_of(form), {**meta, "more": value}, form.shape)
    for key, value in meta.items():
        if type(value) is int and key != "groups":
            refused(parts_of(form), {**meta, key: value + 0.5}, form.shape)
        if isinstance(value, list):
            refused(parts_of(form), {**meta, key: "".join(map(str, value))}, form.shape)


def test_a_trellis_has_no_zero_points():
    form = cases()["trellis"]
    refused({**parts_of(form), "grid/zero": torch.zeros(1, 1, dtype=torch.uint8)}, form.meta(), form.shape)


def test_a_mask_that_keeps_another_number_is_refused():
    form = sparse(9, 16, 3, 0.6)
    mask = form.mask.to(torch.uint8)
    mask[tuple((mask == 0).nonzero()[0])] = 1
    refused({**parts_of(form), "mask": mask}, form.meta(), form.shape)


@pytest.mark.parametrize("gain", [129, -129, -(2**63)])
def test_a_gain_out_of_range_is_refused(gain):
    form = cases()["scaled(grid)"]
    broken = form.gains.long()
    broken[0] = gain
    refused({**parts_of(form), "gains": broken}, form.meta(), form.shape)


BAD_META = [
    ("lowrank(grid, grid)", "rank", [0, -1, 5, 17, 10**30, "x", None, [4], {}, math.nan, math.inf]),
    ("lowrank(grid, grid)", "left", [None, {}, "grid", {"form": "dense"}, {"form": None}, []]),
    ("sparse 2:4", "pattern", [[0, 4], [5, 4], [2, 16], [2, 3], [2], [1, 2, 3], 7, "x:", None, [math.nan, 4], {}]),
    ("sparse 2:4", "kept", [0, -1, 71, 73, 145, 10**30, "x", None, [], math.nan]),
    ("sum(grid, lowrank)", "base", [None, {}, {"form": "sum"}]),
    ("trellis", "grid", [None, {}, "grid", {"form": "dense"}, {"form": "trellis"}, {"form": "codebook"}]),
    ("grid", "form", ["nothing", None, 3, [], "Grid", {}]),
]


@pytest.mark.parametrize("name, key, values", BAD_META, ids=[f"{name} {key}" for name, key, _ in BAD_META])
def test_malformed_meta_is_refused(name, key, values):
    form = cases()[name]
    for value in values:
        refused(parts_of(form), {**form.meta(), key: value}, form.shape)
    if key != "pattern":
        refused(parts_of(form), {k: v for k, v in form.meta().items() if k != key}, form.shape)


@pytest.mark.parametrize("meta", [None, [], "grid", 3, {}])
def test_meta_that_is_no_mapping_with_a_form_is_refused(meta):
    refused({}, meta, (2, 2))


def test_forms_nest_so_deep_and_no_deeper():
    def nested(levels):
        form = dense(2, 3, 0)
        for _ in range(levels):
            form = Sum(form, dense(2, 3, 1))
        return form

    deepest = nested(MAX_DEPTH)
    assert torch.equal(restore(deepest.tensors(), deepest.meta(), (2, 3)).dense(), deepest.dense())
    deeper = nested(MAX_DEPTH + 1)
    refused(deeper.tensors(), deeper.meta(), (2, 3))


@settings(max_examples=80, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(FORMS)))
def test_any_damage_gives_a_matrix_or_an_artifact_error(data, name):
    """Whatever stands in parts and meta: a finite answer of the right shape, or the one error that callers expect."""
    form = cases()[name]
    parts, meta = parts_of(form), form.meta()
    junk = st.one_of(
        st.none(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=3),
        st.lists(st.integers(-3, 9), max_size=3),
        st.just({}), st.sampled_from([{"form": kind} for kind in form_names()]),
    )  # fmt: skip
    if data.draw(st.booleans()) and parts:
        part = data.draw(st.sampled_from(sorted(parts)))
        shape = data.draw(st.lists(st.integers(0, 17), max_size=3))
        dtype = data.draw(
            st.sampled_from([torch.uint8, torch.int64, torch.int8, torch.float32, torch.bool, torch.float16])
        )
        parts[part] = (torch.randn(shape, generator=_generator(data.draw(st.integers(0, 99)))) * 9).to(dtype)
    else:
        meta = {**meta, data.draw(st.sampled_from([*meta, "pattern", "rank", "kept"])): data.draw(junk)}
    try:
        matrix = restore(parts, meta, form.shape).dense()
    except ArtifactError:
        return
    assert tuple(matrix.shape) == form.shape


#: A million weights: what is measured is far above the interpreter's own noise.
ROWS, COLUMNS = 1024, 1024
#: What threads and the allocator take besides.
NOISE = 8 << 20
#: They take what another of the table takes, part by part.
ALIKE = {
    "dense bfloat16", "grid per channel", "grid with zeros", "affine", "affine fitted", "affine of either sign",
    "codebook with scale", "lowrank(dense, dense)", "sparse nothing of dense", "sparse(dense)", "sparse 4:8",
    "sparse 1:2", "sum(grid, sparse)", "sum(trellis, lowrank)", "grouped lowrank(dense, dense)", "folded filter",
    "dense sparse of wide blocks",
}  # fmt: skip


def resident(key):
    return next(
        int(line.split()[1]) << 10 for line in Path("/proc/self/status").read_text().splitlines() if key in line
    )


def peak_and_stated(packed, shape):
    """Bytes that restoring a form and making it dense take, in a process of its own, and those that were counted."""
    # What is touched for the first time counts as taken: code, and the interpreter's objects after the fork.
    unpack(memoryview(packed.blob), packed.parts, packed.meta, shape).dense()
    gc.collect()
    gc.freeze()
    ctypes.CDLL(None).malloc_trim(0)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            allowance = allowance_for(shape)
            Path("/proc/self/clear_refs").write_text("5")
            before = resident("VmRSS") - resident("RssFile")
            unpack(memoryview(packed.blob), packed.parts, packed.meta, shape, allowance).dense()
            os.write(writing, struct.pack("<qq", resident("VmHWM") - resident("RssFile") - before, allowance.stated))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    gc.unfreeze()
    os.close(writing)
    found = os.read(reading, 16)
    os.close(reading)
    return struct.unpack("<qq", found)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux tells the peak of a process")
@pytest.mark.parametrize("name", [name for name in FORMS if name not in ALIKE])
def test_a_form_takes_no_more_memory_than_it_states(name):
    form = FORMS[name](ROWS, COLUMNS, 3)
    packed, shape = pack(form), form.shape
    del form
    gc.collect()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # Pages of libraries that come and go add to a peak, and never take from it.
        for _ in range(3):
            peak, stated = peak_and_stated(packed, shape)
            if 0 < peak <= stated + NOISE:
                break
    finally:
        torch.set_num_threads(before)
    assert 0 < peak <= stated + NOISE, (peak >> 20, stated >> 20)
    # Stating far too much would refuse honest artifacts.
    assert stated <= allowance_for(shape).bytes / 2


@pytest.mark.parametrize("name", FORMS)
def test_another_default_dtype_changes_nothing(name):
    """Loaders of half-precision models set one while they make and fill a model."""
    form = cases()[name]
    index, x = torch.tensor([0, 3, 1]), torch.randn(2, 16)
    wanted = form.dense(), form.lookup(index), form.apply(x)
    torch.set_default_dtype(torch.float16)
    try:
        again = unpack(memoryview((packed := pack(form)).blob), packed.parts, packed.meta, form.shape)
        found = again.dense(), again.lookup(index), again.apply(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(wanted, found, strict=True))
