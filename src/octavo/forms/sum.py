"""Two forms added: a base and its correction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from octavo.forms.base import Form, child, elements, form, nest


@form("sum")
@dataclass(frozen=True)
class Sum(Form):
    """``weight = base + correction``, two forms of the same shape."""

    base: Form
    correction: Form

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102
        return self.base.shape

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        return nest(base=self.base, correction=self.correction)

    def meta(self) -> dict[str, Any]:  # noqa: D102
        return {"form": self.name, "base": self.base.meta(), "correction": self.correction.meta()}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> Sum:  # noqa: D102
        return cls(child(tensors, meta, "base", shape), child(tensors, meta, "correction", shape))

    @classmethod
    def work(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], shape: tuple[int, int]) -> int:  # noqa: D102
        return 4 * elements(shape)

    def grown(self, share: float, stored: Callable[[Form], int]) -> int:  # noqa: D102
        return self.base.grown(share, stored) + self.correction.grown(share, stored)

    def dense(self) -> Tensor:  # noqa: D102
        return self.base.dense() + self.correction.dense()

    def apply(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.base.apply(x) + self.correction.apply(x)

    def lookup(self, index: Tensor) -> Tensor:  # noqa: D102
        return self.base.lookup(index) + self.correction.lookup(index)
