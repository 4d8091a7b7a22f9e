"""Honest forms of every registered kind, nested at random: what mutants are made from."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from octavo import forms
from octavo.coding.ggml import TYPES
from octavo.forms import Form
from octavo.forms.ggml import GgmlBlocks
from octavo.forms.tensor_train import full_ranks

Maker = Callable[["Gallery", int, int], Form]

#: Forms that hold no other, in which nests end.
LEAVES = ("dense", "grid", "codebook")
#: Nests may be a little deeper than this: a form that holds others may stand where they end.
_DEEPEST = 3


class Gallery:
    """Makes forms of given shapes from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._torch = torch.Generator().manual_seed(seed)
        self._depth = 0

    def form(self, kind: str, rows: int, columns: int) -> Form:
        """A form of one kind; what it holds is of any."""
        return MAKERS[kind](self, rows, columns)

    def inner(self, rows: int, columns: int) -> Form:
        """What a form holds: mostly a leaf, so that nests end."""
        ends = self._depth == _DEEPEST or self.random.random() < 0.7
        kinds = LEAVES if ends else ("lowrank", "sparse", "sum", "trellis", "scaled", "affine", "cut")
        self._depth += 1
        made = self.form(self.random.choice(kinds), rows, columns)
        self._depth -= 1
        return made

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
        return torch.randint(low, high, shape, generator=self._torch, dtype=dtype)

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._torch)

    def positive(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._torch) + 0.1

    def mask(self, share: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._torch) < share


def divisor(number: int, *candidates: int) -> int:
    """The first candidate that divides the number, else 1."""
    return next((n for n in candidates if number % n == 0), 1)


def kernel_of(columns: int) -> tuple[int, int, int]:
    """Channels, height and width with as many elements."""
    width = divisor(columns, 4, 3, 2)
    return (columns // width, width // 2, 2) if width == 4 else (columns // width, 1, width)


def dense(g: Gallery, rows: int, columns: int) -> Form:
    return forms.Dense(g.floats(rows, columns).to(g.random.choice([torch.float32, torch.float16, torch.bfloat16])))


def grid(g: Gallery, rows: int, columns: int, *, zeros: bool = True) -> forms.Grid:
    codes = g.integers(-9, 10, rows, columns, dtype=g.random.choice([torch.int8, torch.int16, torch.int32]))
    groups = divisor(columns, g.random.choice([1, 2, 4]))
    scale = g.positive(g.random.choice([1, rows]), groups)
    zero = g.integers(0, 5, *scale.shape, dtype=torch.uint8) if zeros and g.random.random() < 0.4 else None
    steps = [g.integers(-60, 60, n, dtype=torch.int16) if g.random.random() < 0.5 else None for n in (rows, columns)]
    return forms.Grid(codes, scale, zero, *steps)


def affine(g: Gallery, rows: int, columns: int) -> Form:
    groups, kind = divisor(columns, 8, 4, 3, 2), g.random.choice(["plain", "reach", "product", "no offset", "many"])
    codes = g.integers(0, 2000 if kind == "many" else 16, rows, columns, dtype=torch.int16)
    step, low = (g.positive(rows, groups).bfloat16().float() + k for k in (0.5, -1.0))
    if kind == "reach":
        step = ((step - low) / 15).half().float()
    if kind == "product":
        step = (step[:, :1].half() * g.integers(0, 64, *step.shape, dtype=torch.int16)).float()
    if kind == "no offset":
        return forms.Affine(codes - 8, torch.where(step < 1, -step, step))
    return forms.Affine(codes, step, low, g.random.choice([torch.float32, torch.bfloat16, torch.float16]))


def codebook(g: Gallery, rows: int, columns: int) -> Form:
    many = g.random.random() < 0.3
    values = 300 if many else 7
    codes = g.integers(0, values, rows, columns, dtype=torch.int32 if many else torch.uint8)
    return forms.Codebook(codes, g.floats(values).half(), g.positive(rows, 1) if g.random.random() < 0.5 else None)


def e8(g: Gallery, rows: int, columns: int) -> Form:
    blocks = -(-columns // 8)
    first, last = (g.integers(-3, 4, rows, count, dtype=torch.int8) for count in (7 * blocks, blocks))
    return forms.E8(first, last, g.mask(0.5, rows, blocks), columns)


def block_scaled(g: Gallery, rows: int, columns: int) -> Form:
    return forms.BlockScaled(g.inner(rows, columns), g.inner(rows, divisor(columns, 4, 3, 2)))


def sparse(g: Gallery, rows: int, columns: int) -> Form:
    keep, group = g.random.choice([(2, 4), (4, 8), (1, 2)])
    if columns % group == 0 and g.random.random() < 0.4:
        chosen = g.floats(rows, columns // group, group).argsort(-1).argsort(-1) < keep
        mask = chosen.reshape(rows, columns)
        return forms.Sparse(mask, g.inner(1, int(mask.sum())), (keep, group))
    mask = g.mask(g.random.choice([0.03, 0.5]), rows, columns)
    mask[0, 0] = True
    return forms.Sparse(mask, g.inner(1, int(mask.sum())))


def lowrank(g: Gallery, rows: int, columns: int) -> Form:
    rank = max(1, min(rows, columns) // 3)
    return forms.LowRank(g.inner(rows, rank), g.inner(rank, columns))


def grouped(g: Gallery, rows: int, columns: int) -> Form:
    groups = divisor(columns, 4, 3, 2)
    rank = max(1, min(rows, columns // groups) // 2)
    return forms.GroupedLowRank(g.inner(rows, groups * rank), g.inner(groups * rank, columns // groups), groups)


def folded(g: Gallery, rows: int, columns: int) -> Form:
    c, h, w = kernel_of(columns)
    fold, shape = g.random.choice([("spatial", (c * h, rows * w)), ("filter", (h * w, rows * c))])
    return forms.Folded(g.inner(*shape), fold, (c, h, w))


def frequency(g: Gallery, rows: int, columns: int) -> Form:
    _, height, width = kernel_of(columns)
    block = g.random.choice([(1, height, width), (divisor(rows, 4, 3, 2), 1, divisor(columns, 8, 4, 3, 2))])
    return forms.Frequency(g.inner(rows, columns), block)


def row_blocks(g: Gallery, rows: int, columns: int) -> Form:
    count = min(3, rows)
    member = (torch.arange(rows) % count)[torch.randperm(rows, generator=g._torch)].to(torch.uint8)
    sizes = member.long().bincount(minlength=count).tolist()
    return forms.RowBlocks(member, tuple(g.inner(size, columns) for size in sizes))


def dense_sparse(g: Gallery, rows: int, columns: int) -> Form:
    width = min(4, columns)
    atoms, blocks = max(width, min(rows, 6)), -(-columns // width)
    nonzeros = min(2, atoms)
    order = g.floats(rows, blocks, atoms).argsort(-1)[..., :nonzeros]
    index = (order.sort(-1).values if g.random.random() < 0.6 else order).flatten(1).to(torch.uint8)
    return forms.DenseSparse(g.inner(rows, blocks * nonzeros), index, g.inner(blocks * atoms, width), nonzeros, columns)


def tensor_train(g: Gallery, rows: int, columns: int) -> Form:
    first, second = (2, 3) if min(rows, columns) > 5 else (1, 1)
    o, i = [first, 1, -(-rows // first)], [1, second, -(-columns // second)]
    ranks = [min(3, most) for most in full_ranks(o, i)]
    cores = tuple(g.inner(ranks[k] * o[k] * i[k], ranks[k + 1]) for k in range(3))
    return forms.TensorTrain(cores, tuple(o), tuple(i), rows, columns)


def separable(g: Gallery, rows: int, columns: int) -> Form:
    c, h, w = kernel_of(columns)
    terms = min(2, c * h, c * w, h * w)
    return forms.Separable(*(g.inner(terms * rows, size) for size in (c, h, w)), terms)


def vectors(g: Gallery, rows: int, columns: int) -> Form:
    width, books = min(columns, g.random.choice([1, 3, 4])), g.random.choice([1, 2])
    blocks = -(-columns // width)
    codes = g.integers(0, 7, books, rows, blocks, dtype=torch.uint8)
    values = g.floats(books, g.random.choice([1, blocks]), 7, width).half()
    return forms.Vectors(codes, values, columns, g.positive(rows, 1) if g.random.random() < 0.5 else None)


def hashed(g: Gallery, rows: int, columns: int) -> Form:
    width = min(columns, g.random.choice([3, columns]))
    size = max(1, rows * -(-columns // width) // 2)
    hashes = [forms.Hash(size, 0, 1 + k, 48271, 7, g.random.choice([0, 1])) for k in range(g.random.choice([1, 2]))]
    return forms.Hashed(g.inner(size, width), tuple(hashes), rows, columns, g.random.random() < 0.5)


def cut(g: Gallery, rows: int, columns: int) -> Form:
    kept = [g.mask(0.7, n) for n in (rows, columns)]
    for mask in kept:
        mask[0] = True
    return forms.Trimmed(g.inner(*(int(mask.sum()) for mask in kept)), *kept)


def scaled(g: Gallery, rows: int, columns: int) -> Form:
    return forms.Scaled(g.inner(rows, columns), g.integers(-128, 129, rows, dtype=torch.int16))


def ggml(g: Gallery, rows: int, columns: int) -> Form:
    kind = TYPES[g.random.choice(list(TYPES))]
    blocks = -(-columns // kind.block)
    found = kind.unpacked(g.integers(0, 256, rows, blocks * kind.bytes, dtype=torch.uint8))
    heads = {"d": g.floats(rows, blocks).half()}
    if kind.offset:
        heads["base"] = g.positive(rows, blocks).half()
    return GgmlBlocks(kind.packed(replace(found, **heads)), kind.name, columns)


#: How a form of each registered kind is made.
MAKERS: dict[str, Maker] = {
    "affine": affine, "block-scaled": block_scaled, "codebook": codebook, "cut": cut, "dense": dense, "dense-sparse": dense_sparse, "e8": e8, "folded": folded, "frequency": frequency,
    "ggml": ggml, "grid": grid, "grouped-lowrank": grouped, "lowrank": lowrank, "row-blocks": row_blocks, "scaled": scaled,
    "separable": separable, "sparse": sparse, "tensor-train": tensor_train, "vectors": vectors, "hashed": hashed,
    "exact": lambda g, rows, columns: forms.Exact.of(g.floats(rows, columns).float()),
    "sum": lambda g, rows, columns: forms.Sum(g.inner(rows, columns), g.inner(rows, columns)),
    "trellis": lambda g, rows, columns: forms.Trellis(grid(g, rows, columns, zeros=False)),
}  # fmt: skip
