"""PowerSGD with a rank for every matrix, its factors averaged in float32: what L-GreCo chooses in its source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from octavo.flows.updates.allocating import least_bytes

#: Between two choices of ranks, and the gradients before one that it is made from.
REFRESH, LATE = 100, 10


@dataclass
class RankedGradients:
    """Workers' gradients, averaged in factors.

    Parameters
    ----------
    evidence
        A mean gradient of every parameter, from which ranks are chosen first.
    rank
        The uniform rank, whose error is the bound.
    uniform
        Whether that rank stays everywhere.
    sent, steps
        Bytes that a worker handed over so far, and in how many steps.
    """

    evidence: Sequence[Tensor]
    rank: int
    group: dist.ProcessGroup
    ranks: list[int] = field(default_factory=list)
    uniform: bool = False
    sent: int = 0
    steps: int = 0

    def __post_init__(self) -> None:
        self._missing = [torch.zeros_like(tensor) for tensor in self.evidence]
        self._late = [torch.zeros_like(tensor) for tensor in self.evidence]
        self._choose(self.evidence)

    @property
    def bytes(self) -> int:
        """Bytes of a step, the mean over all steps."""
        return round(self.sent / self.steps)

    @torch.no_grad()
    def average(self, gradients: Sequence[Tensor]) -> None:
        """Replace the gradients by their mean over all workers, as far as the ranks hold it."""
        fed = [own + missing for own, missing in zip(gradients, self._missing, strict=True)]
        lefts = [
            folded(own) @ right if rank else own for own, right, rank in zip(fed, self._rights, self.ranks, strict=True)
        ]
        lefts = self._mean(lefts)
        lefts = [torch.linalg.qr(left).Q if rank else left for left, rank in zip(lefts, self.ranks, strict=True)]
        which = [number for number, rank in enumerate(self.ranks) if rank]
        sent = sum(left.nbytes for left in lefts)
        for number, right in zip(which, self._mean([folded(fed[k]).T @ lefts[k] for k in which]), strict=True):
            self._rights[number] = right
            sent += right.nbytes
        for number, (gradient, own) in enumerate(zip(gradients, fed, strict=True)):
            if self.ranks[number]:
                gradient.copy_((lefts[number] @ self._rights[number].T).view_as(gradient))
                self._missing[number] = own - gradient
            else:
                gradient.copy_(lefts[number])
                self._missing[number] = torch.zeros_like(own)
        self.sent, self.steps = self.sent + sent, self.steps + 1
        if -self.steps % REFRESH < LATE:
            self._late = [late + own / LATE for late, own in zip(self._late, fed, strict=True)]
            if self.steps % REFRESH == 0:
                self._choose(self._late)
                self._late = [torch.zeros_like(own) for own in fed]

    def _choose(self, evidence: Sequence[Tensor]) -> None:
        """New ranks, the same on all workers; what is missing stays."""
        told = torch.tensor((uniform_ranks if self.uniform else chosen_ranks)(evidence, self.rank))
        dist.broadcast(told, dist.get_global_rank(self.group, 0), group=self.group)
        self.ranks = told.tolist()
        generator = torch.Generator().manual_seed(self.steps)
        self._rights = [
            torch.randn(folded(own).shape[1], rank, generator=generator)
            for own, rank in zip(evidence, self.ranks, strict=True)
        ]

    def _mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat, group=self.group)
        parts = (flat / dist.get_world_size(self.group)).split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def chosen_ranks(evidence: Sequence[Tensor], rank: int) -> list[int]:
    """The ranks of fewest bytes, of half to twice ``rank``, within the error of ``rank`` everywhere; 0 is dense.

    Errors are Frobenius norms of what is lost, and add up, as in the source.
    """
    options = [rank, *(r for r in range(max(rank // 2, 1), 2 * rank + 1) if r != rank), 0]
    sizes, errors = (np.zeros((len(evidence), len(options))) for _ in range(2))
    for row, tensor in enumerate(evidence):
        matrix = folded(tensor)
        tails = torch.linalg.svdvals(matrix.double()).square().flip(0).cumsum(0).flip(0).sqrt().tolist()
        for column, option in enumerate(options):
            factors = option * sum(matrix.shape)
            # As in PyTorch's hook, what factors would not halve is sent as it is.
            whole = not option or tensor.ndim < 2 or 2 * factors >= tensor.numel()
            sizes[row, column] = tensor.nbytes if whole else 4 * factors
            errors[row, column] = 0.0 if whole or option >= len(tails) else tails[option]
    chosen = least_bytes(sizes.astype(np.int64), errors, float(errors[:, 0].sum()))
    whole = sizes[np.arange(len(evidence)), chosen] == [tensor.nbytes for tensor in evidence]
    return [0 if dense else options[column] for column, dense in zip(chosen.tolist(), whole.tolist(), strict=True)]


def folded(tensor: Tensor) -> Tensor:
    """A gradient as a matrix (outputs, everything else); vectors as one row."""
    return tensor.flatten(1) if tensor.ndim > 1 else tensor[None]


def uniform_ranks(tensors: Sequence[Tensor], rank: int) -> list[int]:
    """The ranks of PyTorch's PowerSGD hook: the given one, or 0 for what its factors would not halve."""
    halved = [tensor.ndim > 1 and 2 * rank * sum(folded(tensor).shape) < tensor.numel() for tensor in tensors]
    return [rank if half else 0 for half in halved]


def uniform_bytes(tensors: Sequence[Tensor], rank: int) -> int:
    """Bytes that PyTorch's PowerSGD hook sends at a rank: factors in float32, other tensors as they are."""
    ranks = uniform_ranks(tensors, rank)
    return sum(4 * (r * sum(folded(t).shape) if r else t.numel()) for t, r in zip(tensors, ranks, strict=True))
