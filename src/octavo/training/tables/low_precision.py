"""Low-precision training: elements lie on a grid at every step, and are rounded at random so that no update is lost.

Source: Li et al. (2023), arXiv 2212.05735 (ALPT), which learns a step for every row.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from octavo.errors import RequestError
from octavo.forms import Grid
from octavo.training.tables.base import CompactTable
from octavo.training.tables.by_form import DEVIATION

#: Codes are at most 16 bits.
_MOST = 32767


class LowPrecision(CompactTable):
    """``row = step * codes`` with integer codes from ``-levels`` to ``levels``.

    While it trains, updated elements are rounded up or down at random, with probabilities that keep their mean. Steps
    that are learned get the gradient of the rounded value, straight through the rounding; they are learned as
    logarithms, so that one rate fits all of them.

    Parameters
    ----------
    levels
        The largest code: 127 for 8 bits, 1 for ternary codes.
    reach
        What the largest code stands for at first.
    learned
        Whether every row learns a step of its own; else all rows share a fixed one.

    Raises
    ------
    RequestError
        If there are no codes, more than 16 bits hold, or no positive reach.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, levels: int = 127, *, reach: float = 0.5, learned: bool = False
    ) -> None:
        super().__init__(num_embeddings, embedding_dim)
        if not 1 <= levels <= _MOST or not reach > 0:
            raise RequestError(
                f"low precision: {levels} levels that reach {reach}; give 1 to {_MOST} levels and a positive reach"
            )
        self.levels = levels
        self.latent = nn.Parameter(torch.randn(num_embeddings, embedding_dim) * min(DEVIATION, reach))
        steps = torch.full((num_embeddings if learned else 1, 1), reach / levels)
        self.log_step = nn.Parameter(steps.log(), requires_grad=learned)

    def read(self, index: Tensor) -> Tensor:  # noqa: D102
        # The precision in which steps are stored.
        step = self.log_step.exp()
        step = step + (step.half().float().clamp_min(1e-7) - step).detach()
        step = step[index] if len(step) > 1 else step
        inside = (self.latent[index] / step).clamp(-self.levels, self.levels)
        codes = self._rounded(inside.detach())
        if self.training:
            with torch.no_grad():
                self.latent[index] = codes * step
        return step * (inside + (codes - inside).detach())

    def form(self) -> Grid:  # noqa: D102
        step = self.log_step.detach().exp().half().float().clamp_min(1e-7)
        codes = (self.latent.detach() / step).round().clamp(-self.levels, self.levels).cpu()
        return Grid(codes.to(torch.int8 if self.levels < 128 else torch.int16), step.cpu().half())

    def _rounded(self, scaled: Tensor) -> Tensor:
        # The largest code is whole, so that no draw exceeds it.
        return (scaled + torch.rand_like(scaled)).floor() if self.training else scaled.round()
