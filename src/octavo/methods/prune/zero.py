"""Zero: nothing of a difference is stored, so the tuned model keeps the base's weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.calibration.evidence import Evidence
from octavo.forms import Form, Grid
from octavo.methods.base import Method, Setting, method


@method("zero", family="prune", preset="fast", source="the base's own weight, the end of every pruning")
@dataclass(frozen=True)
class Zero(Method):
    """Every weight is zero, in a few bytes.

    Of a difference of a tuned weight to its base this leaves the base's weight. So a hundred bytes a tensor are the
    least that a delta needs, and the allocator decides which tensors are worth more.
    """

    by_rows = True
    changes = True
    takes = ()

    def settings(self, weight: Tensor, evidence: Evidence) -> list[Setting]:
        """The only one."""
        return [{}]

    def encode(self, weight: Tensor, setting: Setting, evidence: Evidence) -> Form:  # noqa: D102
        return Grid(torch.zeros(weight.shape, dtype=torch.int8), torch.ones(1, 1))
