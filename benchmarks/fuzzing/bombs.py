"""Sites whose description is consistent throughout, takes hardly any bytes, and asks for as much as it may."""

from __future__ import annotations

import random

import numpy as np
import torch

from fuzzing.blobs import constant, write_parts
from fuzzing.draft import Draft, mutation, pick
from octavo import coding

Parts = dict[str, tuple[bytes, list]]

#: Elements of one coded part that stay below what a reader lets a site of a few thousand weights hold.
_CODED = 1 << 22
#: Elements of the largest mask that is coded.
_MASK = 1 << 22


class Bomb:
    """Makes forms of any shape whose leaves are constants, and whose own numbers are as large as their checks let them."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def form(self, rows: int, columns: int, depth: int = 0) -> tuple[dict, Parts]:
        """Description and parts of a form of some kind."""
        kinds = [
            "lowrank",
            "grouped",
            "cut",
            "sparse",
            "dense_sparse",
            "sum",
            "scaled",
            "blocks",
            "separable",
            "train",
            "folded",
        ]
        fits = rows * columns <= _CODED
        if depth > 4 or (fits and self.rng.random() < 0.35 + 0.2 * depth):
            return self.leaf(rows, columns) if fits else self.cut(rows, columns, depth, ends=True)
        kind = self.rng.choice(
            kinds if rows + columns <= _CODED else ["cut", "lowrank", "separable", "train", "grouped"]
        )
        return getattr(self, kind)(rows, columns, depth + 1)

    def leaf(self, rows: int, columns: int) -> tuple[dict, Parts]:
        codes = constant(rows * columns, self.rng, (rows, columns), 1, torch.int8)
        kind = self.rng.choice(["grid", "grid", "codebook", "trellis"])
        one = np.float32(1).tobytes()
        if kind == "codebook":
            return {"form": "codebook"}, {"codes": (codes, []), "values": (one * 2, ["float32", 2])}
        if kind == "trellis":
            return {"form": "trellis", "grid": {"form": "grid"}}, {
                "grid/codes": (codes, []),
                "grid/scale": (one, ["float32", 1, 1]),
            }
        return {"form": "grid"}, {"codes": (codes, []), "scale": (one, ["float32", 1, 1])}

    def _with(self, meta: dict, parts: Parts, **children: tuple[dict, Parts]) -> tuple[dict, Parts]:
        for name, (inner, own) in children.items():
            meta[name] = inner
            parts.update({f"{name}/{key}": part for key, part in own.items()})
        return meta, parts

    def _most(self, most: int) -> int:
        return max(1, self.rng.choice([1, 2, most // 2, most, most]))

    def lowrank(self, rows: int, columns: int, depth: int) -> tuple[dict, Parts]:
        rank = self._most(max(rows, columns))
        meta = {"form": "lowrank", "rank": rank}
        return self._with(meta, {}, left=self.form(rows, rank, depth), right=self.form(rank, columns, depth))

    def grouped(self, rows: int, columns: int, depth: int) -> tuple[dict, Parts]:
        groups = self.rng.choice([columns, 1, columns, *(n for n in (2, 3, 4, 8) if columns % n == 0)])
        rank = self._most(max(rows, columns // groups))
        meta = {"form": "grouped-lowrank", "groups": groups, "rank": rank}
        left, right = self.form(rows, groups * rank, depth), self.form(groups * rank, columns // groups, depth)
        return self._with(meta, {}, left=left, right=right)

    def cut(self, rows: int, columns: int, depth: int, ends: bool = False) -> tuple[dict, Parts]:
        """A matrix of which one row or column is kept, so that what is inside may be small."""
        kept, parts = [], dict[str, tuple[bytes, list]]()
        for name, size in (("rows", rows), ("columns", columns)):
            kept.append(1 if ends or self.rng.random() < 0.5 else size)
            # So large a mask takes long to code; it contradicts its form then.
            if kept[-1] == size or size > _MASK:
                parts[name] = (constant(size, self.rng, (size,), 1, torch.uint8), [])
                continue
            mask = torch.zeros(size, dtype=torch.uint8)
            mask[0] = 1
            parts[name] = (coding.encode(mask), [])
        inner = self.leaf(*kept) if kept[0] * kept[1] <= _CODED else self.form(*kept, depth + 1)
        return self._with({"form": "cut"}, parts, inner=inner)

    def sparse(self, rows: int, columns: int, depth: int) -> tuple[dict, Parts]:
        if rows * columns > _CODED or self.rng.random() < 0.5:
            gaps = (coding.encode(torch.zeros(1, dtype=torch.int64)), [])
            return self._with({"form": "sparse", "kept": 1}, {"gaps": gaps}, values=self.leaf(1, 1))
        kept = rows * columns
        gaps = (constant(kept, self.rng, (kept,), 0, torch.int64), [])
        return self._with({"form": "sparse", "kept": kept}, {"gaps": gaps}, values=self.form(1, kept, depth))

    def dense_sparse(self, rows: int, columns: int, depth: int) -> tuple[dict, Parts]:
        width = self.rng.choice([1, columns, min(4, columns)])
        atoms, blocks = self._most(max(rows, width)), -(-columns // width)
        nonzeros = self.rng.choice([1, 1, atoms])
        if rows * blocks * nonzeros > _CODED:
            nonzeros = 1
        meta = {"form": "dense-sparse", "nonzeros": nonzeros, "atoms": atoms, "width": width, "columns": columns}
        index = (constant(rows * blocks * nonzeros, self.rng, (rows, blocks * nonzeros), 0, torch.int32), [])
        children = {
            "values": self.form(rows, blocks * nonzeros, depth),
            "dictionary": self.form(blocks * atoms, width, depth),
        }
        return self._with(meta, {"gaps" if nonzeros > 1 or self.rng.random() < 0.5 else "index": index}, **children)

    def sum(self, rows: int, columns: int, depth: int) -> tuple[dict, Parts]:
        return self._with(
            {"form": "sum"}, {}, base=self.form(rows, columns, depth), correction=self.form(rows, columns, depth)
        )

    def scaled(self, rows: int, columns: int, depth: int) -> tuple[dict, Parts]:
        gains = (constant(rows, self.rng, (rows,), 0, torch.int16), [])
        return self._with({"form": "scaled"}, {"gains": gains}, base=self.form(rows, columns, depth))

    def blocks(self, rows: int, columns: int, depth: int) -> tuple[dict, Parts]:
        count = self.rng.choice([1, min(2, rows), min(rows, 256)]) if rows <= 1 << 12 else 1
        member = torch.arange(rows).clamp_max(count - 1).to(torch.uint8) if count > 1 else None
        content = coding.encode(member) if member is not None else constant(rows, self.rng, (rows,), 0, torch.uint8)
        sizes = [1] * (count - 1) + [rows - count + 1]
        children = {f"block{k}": self.form(size, columns, max(depth, 3)) for k, size in enumerate(sizes)}
        return self._with({"form": "row-blocks", "blocks": count}, {"member": (content, [])}, **children)

    def separable(self, rows: int, columns: int, depth: int) -> tuple[dict, Parts]:
        c, h, w = self.rng.choice(
            [(columns, 1, 1), (1, columns, 1), (1, 1, columns), *[(columns // 4, 2, 2)] * (columns % 4 == 0)]
        )
        terms = self._most(min(c * h, c * w, h * w))
        children = {
            name: self.form(terms * rows, n, depth) for name, n in (("channel", c), ("vertical", h), ("horizontal", w))
        }
        return self._with({"form": "separable", "terms": terms, "kernel": [c, h, w]}, {}, **children)

    def train(self, rows: int, columns: int, depth: int) -> tuple[dict, Parts]:
        o, i = self.rng.choice(
            [
                ([rows, 1], [1, columns]),
                ([rows, 1], [columns, 1]),
                ([1, rows, 1], [columns, 1, 1]),
                ([2 * rows, 1], [1, 2 * columns]),
            ]
        )
        sizes = [a * b for a, b in zip(o, i, strict=True)]
        full = [
            min(int(np.prod(sizes[:k], dtype=object)), int(np.prod(sizes[k:], dtype=object)))
            for k in range(len(sizes) + 1)
        ]
        ranks = [1, *(self._most(most) for most in full[1:-1]), 1]
        children = {f"core{k}": self.form(ranks[k] * sizes[k], ranks[k + 1], depth) for k in range(len(sizes))}
        meta = {"form": "tensor-train", "rows": o, "columns": i, "ranks": ranks, "shape": [rows, columns]}
        return self._with(meta, {}, **children)

    def folded(self, rows: int, columns: int, depth: int) -> tuple[dict, Parts]:
        fold, kernel = (
            self.rng.choice(["spatial", "filter"]),
            self.rng.choice([(columns, 1, 1), (1, columns, 1), (1, 1, columns)]),
        )
        c, h, w = kernel
        shape = (c * h, rows * w) if fold == "spatial" else (h * w, rows * c)
        return self._with({"form": "folded", "fold": fold, "kernel": list(kernel)}, {}, inner=self.form(*shape, depth))


SHAPES = [(1, 1 << 12), (1 << 12, 1), (64, 64), (1 << 20, 1), (1, 1 << 20), (1 << 10, 1 << 10), (1 << 22, 1), (1 << 23, 1), (1, 1 << 23),
          (1 << 24, 1), (2, 3), (24, 16), (3000, 3000)]  # fmt: skip


@mutation("bomb: consistent form", weight=14)
def _bomb(draft: Draft, rng: random.Random) -> None:
    for _ in range(rng.choice([1, 1, 1, 4])):
        name = pick(rng, draft.manifest["sites"])
        rows, columns = rng.choice(SHAPES)
        meta, parts = Bomb(rng).form(rows, columns)
        if len(parts) > 4000:
            continue
        site = draft.manifest["sites"][name]
        site.update(shape=[rows, columns], form=meta, dtype=rng.choice(["float32", "float64", "float16"]))
        site.pop("layout", None)
        write_parts(draft, name, parts)
