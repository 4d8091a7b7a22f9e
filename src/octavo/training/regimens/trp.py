"""Trained rank pruning: a network becomes low-rank during training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from octavo.errors import RequestError
from octavo.forms import Dense, Folded, Form, GroupedLowRank, LowRank
from octavo.forms.folded import FOLDS, fold
from octavo.training.regimens.base import Regimen, regimen

SOURCE = "Trained Rank Pruning (Xu et al., 2020, IJCAI; arXiv 2004.14566)"

#: ``channel`` is the matrix as it is, (n, c h w).
FOLDINGS = ("channel", *FOLDS)
#: Relative size of singular values treated as rounding errors of a projected matrix.
_ROUNDING = 1e-6

KernelShape = tuple[int, int, int]


@regimen("trp", source=SOURCE)
@dataclass
class TrainedRankPruning(Regimen):
    """Project the kernels to low rank every few steps, and shrink their nuclear norm in the same steps.

    Every ``every`` steps, before the forward pass, each kernel ``W``, folded to a matrix with the SVD ``U S V^T``, is
    replaced by its first ``k`` components, with the smallest ``k`` such that ``sum_{i<=k} s_i^2 >= energy sum_i
    s_i^2``. The sub-gradient ``nuclear U_k V_k^T`` of ``nuclear |W|_*`` is added to the gradient of that step. After
    the last step kernels are projected once more, so that the stored network is the trained one. As in the paper, the
    optimizer's momentum is unchanged.

    Folds of a kernel (n, c, h, w): ``channel``, (n, c h w): r filters, then one of 1 x 1; ``spatial``, (c h, n w): r
    filters of h x 1, then of 1 x w; ``filter``, every filter as (h w, c): r of 1 x 1, then r of each channel, all
    filters of a layer having the same rank. The first convolution, 1 x 1 convolutions and grouped convolutions are
    skipped.

    Parameters
    ----------
    energy
        Share of the energy that a projection keeps; with 1 only the nuclear norm has an effect.
    every
        Steps from one projection to the next.
    nuclear
        Weight of the nuclear norm; 0 to project alone.
    fold
        ``channel``, ``spatial`` or ``filter``.
    """

    energy: float = 0.9
    every: int = 5
    nuclear: float = 3e-4
    fold: str = "channel"
    _kernels: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _pressure: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _last: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.energy <= 1:
            raise RequestError(f"trained rank pruning: energy is {self.energy!r}; it must be above 0 and at most 1")
        if self.every < 1 or self.nuclear < 0:
            raise RequestError(
                f"trained rank pruning: every is {self.every!r} and nuclear {self.nuclear!r}; they must be at least 1 "
                "and at least 0"
            )
        if self.fold not in FOLDINGS:
            raise RequestError(f"trained rank pruning: fold is {self.fold!r}; choose from {', '.join(FOLDINGS)}")

    def begin(self, model: nn.Module, steps: int) -> None:
        """Find the kernels."""
        self._kernels, self._last = kernels(model), steps - 1
        if not self._kernels:
            raise RequestError(
                f"{type(model).__name__}: has no convolution to decompose, since the first one, 1 x 1 and grouped ones "
                "are skipped; give a model with other convolutions"
            )

    def before_step(self, step: int) -> None:
        """Project every few steps."""
        if step % self.every == 0:
            self._project()

    def after_backward(self, step: int) -> None:
        """Add the sub-gradient of the nuclear norm in the same steps."""
        for name, pressure in self._pressure.items():
            gradient = self._kernels[name].grad
            if gradient is not None:
                gradient.add_(pressure, alpha=self.nuclear)
        self._pressure = {}

    def after_step(self, step: int) -> None:
        """Project the changes of the last steps."""
        if step == self._last:
            self._project()
            self._pressure = {}

    def forms(self, model: nn.Module) -> dict[str, Form]:
        """Factors of the kernels that become smaller; the others stay dense."""
        found = {name: decomposed(weight, self.fold, 1 - _ROUNDING) for name, weight in kernels(model).items()}
        return {name: form for name, form in found.items() if form is not None}

    @torch.no_grad()
    def _project(self) -> None:
        for name, weight in self._kernels.items():
            u, values, v = _decomposition(weight, self.fold)
            rank = values.shape[1] if self.energy == 1 else _rank(values, self.energy)
            u, values, v = u[..., :rank], values[:, :rank], v[:, :rank]
            if self.energy < 1:
                weight.copy_(_unfolded((u * values[:, None]) @ v, self.fold, weight))
            if self.nuclear:
                self._pressure[name] = _unfolded(u @ v, self.fold, weight)


def kernels(model: nn.Module) -> dict[str, Tensor]:
    """Weights of the convolutions to decompose, by name: not the first, not 1 x 1, not grouped."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return {
        f"{name}.weight".lstrip("."): module.weight
        for name, module in found[1:]
        if module.groups == 1 and math.prod(module.kernel_size) > 1
    }


def decomposed(weight: Tensor, which: str, energy: float) -> Form | None:
    """A kernel's factors at the smallest rank that keeps the given energy; None if they are not smaller.

    Parameters
    ----------
    weight
        (n, c, h, w).
    which
        ``channel``, ``spatial`` or ``filter``.
    energy
        Below 1.
    """
    u, values, v = _decomposition(weight.detach(), which)
    rank = _rank(values, energy)
    root = values[:, :rank].sqrt()
    left, right = u[..., :rank] * root[:, None], root[..., None] * v[:, :rank]
    if left.numel() + right.numel() >= weight.numel():
        return None
    factors = Dense(left.transpose(0, 1).flatten(1).contiguous()), Dense(right.flatten(0, 1).contiguous())
    inner = LowRank(*factors) if len(left) == 1 else GroupedLowRank(*factors, len(left))
    return inner if which == "channel" else Folded(inner, which, _kernel(weight))


def _decomposition(weight: Tensor, which: str) -> tuple[Tensor, Tensor, Tensor]:
    """Batched SVD of the folded matrix: one matrix, or one for each filter."""
    matrix = weight.flatten(1)
    if which != "channel":
        matrix = fold(matrix, which, _kernel(weight))
    groups = len(weight) if which == "filter" else 1
    return torch.linalg.svd(matrix.unflatten(1, (groups, -1)).transpose(0, 1), full_matrices=False)


def _rank(values: Tensor, energy: float) -> int:
    """The smallest common rank of all matrices, at least 1, that keeps the given share of their energy."""
    kept = values.double().square().sum(0).cumsum(0)
    return min(1 + int((kept < energy * kept[-1]).sum()), len(kept))


def _unfolded(matrices: Tensor, which: str, weight: Tensor) -> Tensor:
    """The kernel with the given folded matrix or matrices of the filters."""
    matrix = matrices.transpose(0, 1).flatten(1)
    if which != "channel":
        matrix = Folded(Dense(matrix), which, _kernel(weight)).dense()
    return matrix.reshape(weight.shape).to(weight.dtype)


def _kernel(weight: Tensor) -> KernelShape:
    return (weight.shape[1], weight.shape[2], weight.shape[3])
