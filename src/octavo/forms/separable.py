"""Filters that are outer products of one-way filters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.forms.base import Form, child, elements, expect, form, nest

#: Products of channels and height held at once.
_AT_ONCE = 1 << 24


@form("separable")
@dataclass(frozen=True)
class Separable(Form):
    """``weight[n, (c, y, x)] = sum_t channel[t, n, c] vertical[t, n, y] horizontal[t, n, x]``.

    A convolution as the sum of ``T`` terms of one-way filters: over channels, then vertical, then horizontal.

    Parameters
    ----------
    channel, vertical, horizontal
        Forms of shape (T * rows, c), (T * rows, h) and (T * rows, w); term by term, in each the rows.
    terms
        ``T``.
    """

    factored = True

    channel: Form
    vertical: Form
    horizontal: Form
    terms: int

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        columns = self.channel.shape[1] * self.vertical.shape[1] * self.horizontal.shape[1]
        return (self.channel.shape[0] // self.terms, columns)

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        return nest(**self._named())

    def meta(self) -> dict[str, Any]:  # noqa: D102
        kernel = [part.shape[1] for part in self._named().values()]
        inner = {name: part.meta() for name, part in self._named().items()}
        return {"form": self.name, "terms": self.terms, "kernel": kernel, **inner}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> Separable:  # noqa: D102
        terms, (c, h, w) = int(meta["terms"]), map(int, meta["kernel"])
        expect(min(c, h, w) > 0 and c * h * w == shape[1], f"a kernel of {(c, h, w)} does not have {shape[1]} elements")
        expect(0 < terms <= min(c * h, c * w, h * w), f"{terms} terms do not fit a kernel of {(c, h, w)}")
        a, b, d = (
            child(tensors, meta, name, (terms * shape[0], size))
            for name, size in (("channel", c), ("vertical", h), ("horizontal", w))
        )
        return cls(a, b, d, terms)

    @classmethod
    def work(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> int:  # noqa: D102
        c, h, _ = (int(size) for size in meta["kernel"])
        products = shape[0] * c * h
        some = min(int(meta["terms"]) * products, max(_AT_ONCE, products))
        return 12 * elements(shape) + 12 * some

    def dense(self) -> Tensor:  # noqa: D102
        parts = [part.dense().unflatten(0, (self.terms, -1)) for part in self._named().values()]
        # A few terms at a time: the products of all over channels and height may be many times the matrix.
        _, rows, channels = parts[0].shape
        some = max(1, _AT_ONCE // (rows * channels * parts[1].shape[2]))
        first, *others = (
            torch.einsum("tnc,tny,tnx->ncyx", *terms)
            for terms in zip(*(part.split(some) for part in parts), strict=True)
        )
        return sum(others, first).flatten(1)

    def _named(self) -> dict[str, Form]:
        return {"channel": self.channel, "vertical": self.vertical, "horizontal": self.horizontal}
