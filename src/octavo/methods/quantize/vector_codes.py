"""Codes of short vectors of adjacent columns: product and residual quantization with learned codebooks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.calibration.evidence import Evidence
from octavo.errors import RequestError
from octavo.forms import Form, Vectors
from octavo.methods.base import Method, Setting, method
from octavo.methods.feedback import factored
from octavo.methods.knobs import whole
from octavo.methods.quantize.centres import learned, nearest
from octavo.methods.quantize.grids import compact
from octavo.methods.vector_feedback import round_vectors

#: Width, entries of a book, and books: 4 to 1 bits a weight.
_SETTINGS = ((2, 256, 1), (2, 64, 1), (2, 16, 1), (4, 256, 1), (4, 64, 1), (8, 256, 1))
#: Vectors for each entry that books are learned from.
_SAMPLE = 256
_WIDTHS, _ENTRIES, _BOOKS = (1, 2, 4, 8, 16), 4096, 8


@method("vector-codes", family="quantize", preset="best", source="Jegou, Douze & Schmid (2011), IEEE TPAMI 33(1)")
@dataclass(frozen=True)
class VectorCodes(Method):
    """``W[i, block b] = scale[i] * sum_m values[m, codes[m, i, b]]``, one book for all blocks of columns.

    Rows are scaled by their root mean square. A book is learned by k-means on a sample of all vectors, with weights
    ``r[i] scale[i]^2 d[j]``, where ``d`` is the diagonal of the inputs' second moment. A further book is learned from
    what those before it miss. Vectors are then rounded one after another, with error feedback.

    Parameters
    ----------
    feedback
        Let later columns compensate the errors of earlier ones, as in GPTQ.
    iterations
        Of k-means.
    """

    takes = ("width", "entries", "books")

    feedback: bool = True
    iterations: int = 25

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """Settings whose books take less than a quarter of the bytes of their codes."""
        listed = [{"width": width, "entries": entries, "books": books} for width, entries, books in _SETTINGS]
        # Two bytes for each value of a book, and the logarithm of its entries in bits for a code.
        least = [64 * width**2 * entries / math.log2(entries) for width, entries, _ in _SETTINGS]
        return [one for one, elements in zip(listed, least, strict=True) if elements <= weight.numel()]

    def encode(self, weight: Tensor, setting: Setting, evidence: Evidence) -> Form:
        """Books first, then vectors."""
        width = whole(self.name, setting, "width", 1)
        if width not in _WIDTHS:
            raise RequestError(f"{self.name}: width is {width!r}; choose from {', '.join(map(str, _WIDTHS))}")
        entries, books = (
            whole(self.name, setting, "entries", 1, _ENTRIES),
            whole(self.name, setting, "books", 1, _BOOKS),
        )
        weight, (rows, columns) = weight.float(), weight.shape
        peak = weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        scale = compact(peak * (weight / peak).square().mean(1, keepdim=True).sqrt())
        scaled, blocks = weight / scale.float(), -(-columns // width)
        importance = evidence.rows.float() * (scale.float() / scale.float().max()).square().flatten()
        curvature = torch.ones(columns) if evidence.columns is None else evidence.columns.diagonal().float()
        curvature = torch.nn.functional.pad(curvature / curvature.max(), (0, blocks * width - columns)).clamp_min(1e-6)
        vectors = torch.nn.functional.pad(scaled, (0, blocks * width - columns)).view(-1, width)
        costs = curvature.view(blocks, width)
        values = self._books(vectors, importance, costs, entries, books)

        def rounded(own: Tensor, first: int) -> Tensor:
            return _summed(values, _codes(own, values, costs[first // width].expand_as(own)))

        if evidence.columns is not None and self.feedback:
            vectors = round_vectors(scaled, factored(evidence, ordered=False)[2], width, rounded).reshape(-1, width)
        codes = _codes(vectors, values, costs.repeat(rows, 1)).view(books, rows, blocks)
        return Vectors(codes.to(torch.uint8 if entries <= 256 else torch.int16), values[:, None].half(), columns, scale)

    def _books(self, vectors: Tensor, importance: Tensor, costs: Tensor, entries: int, books: int) -> Tensor:
        """(books, entries, width), rounded to float16."""
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randperm(len(vectors), generator=generator)[: _SAMPLE * entries]
        rest = vectors[chosen]
        cost = costs[chosen % len(costs)] * importance[chosen // len(costs), None].clamp_min(1e-12)
        made: list[Tensor] = []
        for _ in range(books):
            book = learned(rest, cost, entries, self.iterations, generator).half().float()
            made.append(book)
            rest = rest - book[nearest(rest, book, cost)]
        return torch.stack(made)


def _codes(vectors: Tensor, values: Tensor, cost: Tensor) -> Tensor:
    """Entries (books, vectors) that a greedy search chooses, one book after another."""
    chosen, rest = [], vectors
    for book in values:
        chosen.append(nearest(rest, book, cost))
        rest = rest - book[chosen[-1]]
    return torch.stack(chosen)


def _summed(values: Tensor, codes: Tensor) -> Tensor:
    return torch.stack([book[own] for book, own in zip(values, codes, strict=True)]).sum(0)
